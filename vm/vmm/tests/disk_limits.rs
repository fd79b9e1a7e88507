//! Limits of a disk: a request that has to wait holds up nothing else, and goes on when the limits change.

mod support;

use std::fs::File;

use monitor::{
    ChainLink, Command as Ask, Disk, DiskBus, DiskFormat, DiskThrottle, Event, FailureClass, RateLimit, RateLimits,
    Reply, ShutdownCause,
};
use support::Vm;
use support::blk::{REQUEST_BYTES, check_written, writer};

const REQUESTS: u16 = 8;

/// So slow that a second request does not come through while a test runs.
fn crawl() -> DiskThrottle {
    let write = RateLimit { rate: 1, ..RateLimit::default() };
    DiskThrottle { bytes: RateLimits { write, ..RateLimits::default() }, ..DiskThrottle::default() }
}

fn writes(vm: &mut Vm) -> u64 {
    let Ok(Reply::Stats(stats)) = vm.ask(Ask::QueryStats) else { panic!("no statistics") };
    stats.disks[0].writes
}

#[test]
fn a_guest_waits_for_its_limits_and_goes_on_when_they_change() {
    let image = tempfile::tempfile().unwrap();
    image.set_len(u64::from(REQUESTS) * u64::from(REQUEST_BYTES)).unwrap();
    let mut vm = Vm::start(&writer(1, REQUESTS), |plan| {
        let file: File = image.try_clone().unwrap();
        let link = ChainLink { file: plan.add(file), path: "disk.raw".into(), format: DiskFormat::Raw };
        let disk = Disk::new("vda", DiskBus::Virtio, vec![link]);
        plan.config.disks.push(Disk { throttle: crawl(), ..disk });
    });
    while writes(&mut vm) == 0 {}
    // The second request waits, over a pause too; monitor and lifecycle do not.
    for command in [Ask::Stop, Ask::Cont, Ask::QueryStatus] {
        vm.ask(command).unwrap();
    }
    let set = |target: &str, throttle| Ask::SetDiskThrottle { target: target.into(), throttle };
    let refused = vm.ask(set("vda", DiskThrottle { request_bytes: 1, ..crawl() })).unwrap_err();
    assert_eq!(refused.class, FailureClass::Config);
    assert_eq!(refused.text, "limits of disk 'vda': iops size requires an iops value to be set");
    assert_eq!(vm.ask(set("vdz", crawl())).unwrap_err().text, "there is no disk 'vdz'");
    assert_eq!(writes(&mut vm), 1);
    // Other limits that let the rest through slowly, then none.
    assert_eq!(vm.ask(set("vda", crawl())), Ok(Reply::Done));
    while writes(&mut vm) < 2 {}
    assert_eq!(vm.ask(set("vda", DiskThrottle::default())), Ok(Reply::Done));
    assert_eq!(vm.line(), "written");
    while vm.event() != (Event::Shutdown { cause: ShutdownCause::PowerOff }) {}
    assert_eq!(vm.end().0.code(), Some(0));
    check_written(&image, REQUESTS);
}

#[test]
fn a_reset_forgets_what_waits() {
    let image = tempfile::tempfile().unwrap();
    image.set_len(u64::from(REQUESTS) * u64::from(REQUEST_BYTES)).unwrap();
    let mut vm = Vm::start(&writer(1, REQUESTS), |plan| {
        let file: File = image.try_clone().unwrap();
        let link = ChainLink { file: plan.add(file), path: "disk.raw".into(), format: DiskFormat::Raw };
        plan.config.disks.push(Disk { throttle: crawl(), ..Disk::new("vda", DiskBus::Virtio, vec![link]) });
    });
    while writes(&mut vm) == 0 {}
    assert_eq!(vm.ask(Ask::SystemReset), Ok(Reply::Done));
    assert_eq!(vm.event(), Event::Reset { guest: false });
    let none = Ask::SetDiskThrottle { target: "vda".into(), throttle: DiskThrottle::default() };
    assert_eq!(vm.ask(none), Ok(Reply::Done));
    assert_eq!(vm.line(), "written");
    // One before the reset, all after it.
    assert_eq!(vm.end().0.code(), Some(0));
    check_written(&image, REQUESTS);
}
