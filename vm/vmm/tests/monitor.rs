//! A machine started as vireod starts it, driven through its monitor.

mod support;

use std::fs::File;
use std::io::Write;

use monitor::{
    Command, Console, ConsoleTarget, Event, FailureClass, FdIndex, PowerAction, Reply, RunReason, RunState,
    ShutdownCause, StartReply, Status,
};
use support::{Guest, Vm, plan, start};

fn status(state: RunState, reason: RunReason) -> Reply {
    Reply::Status(Status { state, reason })
}

#[test]
fn a_machine_starts_stops_goes_on_and_powers_off_by_its_button() {
    let guest = Guest::default().print("up\n").wait_for_power_button().print("bye\n").power_off();
    let mut vm = Vm::start(&guest, |plan| plan.config.paused = true);
    assert_eq!(vm.ask(Command::QueryStatus), Ok(status(RunState::Prelaunch, RunReason::Booted)));
    assert_eq!(vm.ask(Command::Cont), Ok(Reply::Done));
    assert_eq!(vm.event(), Event::Resumed);
    assert_eq!(vm.line(), "up");
    assert_eq!(vm.ask(Command::Stop), Ok(Reply::Done));
    assert_eq!(vm.event(), Event::Stopped { reason: RunReason::User });
    assert_eq!(vm.ask(Command::QueryStatus), Ok(status(RunState::Paused, RunReason::User)));
    assert_eq!(vm.ask(Command::SystemPowerdown), Ok(Reply::Done));
    assert_eq!(vm.ask(Command::Cont), Ok(Reply::Done));
    assert_eq!(vm.event(), Event::Resumed);
    assert_eq!(vm.line(), "bye");
    assert_eq!(vm.event(), Event::Shutdown { cause: ShutdownCause::PowerOff });
    let (status, words) = vm.end();
    assert_eq!((status.code(), words.as_str()), (Some(0), ""));
}

#[test]
fn resets_by_the_guest_and_by_a_command() {
    let guest = Guest::default().print("boot\n").echo_byte().reset();
    let mut vm = Vm::start(&guest, |_| {});
    assert_eq!(vm.line(), "boot");
    assert_eq!(vm.ask(Command::SystemReset), Ok(Reply::Done));
    assert_eq!(vm.event(), Event::Reset { guest: false });
    assert_eq!(vm.line(), "boot");
    vm.serial.write_all(b"\n").unwrap();
    assert_eq!(vm.line(), "");
    assert_eq!(vm.event(), Event::Reset { guest: true });
    assert_eq!(vm.line(), "boot");
    assert_eq!(vm.ask(Command::Quit), Ok(Reply::Done));
    assert_eq!(vm.event(), Event::Shutdown { cause: ShutdownCause::Quit });
    assert_eq!(vm.end().0.code(), Some(0));
}

#[test]
fn policies_decide_what_the_end_of_a_guest_means() {
    let mut vm = Vm::start(&Guest::default().power_off(), |plan| {
        plan.config.on_poweroff = PowerAction::Preserve;
        plan.config.paused = true;
    });
    assert_eq!(vm.ask(Command::Cont), Ok(Reply::Done));
    assert_eq!(vm.event(), Event::Resumed);
    assert_eq!(vm.event(), Event::Stopped { reason: RunReason::GuestShutdown });
    assert_eq!(vm.ask(Command::QueryStatus), Ok(status(RunState::Shutdown, RunReason::GuestShutdown)));
    assert_eq!(vm.ask(Command::Cont).unwrap_err().class, FailureClass::State);
    assert_eq!(vm.ask(Command::Quit), Ok(Reply::Done));

    let mut vm = Vm::start(&Guest::default().echo_byte().triple_fault(), |plan| {
        plan.config.on_reboot = PowerAction::Destroy;
    });
    vm.serial.write_all(b"x").unwrap();
    assert_eq!(vm.event(), Event::Shutdown { cause: ShutdownCause::Reset });
    assert_eq!(vm.end().0.code(), Some(0));

    // pvpanic: bit 0 of port 0x505 says that the guest has crashed.
    let mut vm = Vm::start(&Guest::default().echo_byte().out8(0x505, 1).spin(), |_| {});
    vm.serial.write_all(b"x").unwrap();
    assert_eq!(vm.event(), Event::Crashed { text: "the guest reports a panic".into() });
    assert_eq!(vm.event(), Event::Shutdown { cause: ShutdownCause::Crash });
    let (status, words) = vm.end();
    assert_eq!((status.code(), words.as_str()), (Some(1), "vireo-vmm: the guest reports a panic\n"));
}

#[test]
fn statistics_count() {
    let mut vm = Vm::start(&Guest::default().print("up\n").spin(), |_| {});
    assert_eq!(vm.line(), "up");
    let Ok(Reply::Stats(stats)) = vm.ask(Command::QueryStats) else { panic!("no statistics") };
    assert_eq!((stats.vcpus.len(), stats.disks.len()), (1, 0));
    assert!(stats.vcpus[0].thread_id != 0 && stats.vcpus[0].cpu_ns != 0 && !stats.vcpus[0].halted);
    assert!((4..4096).contains(&stats.ram_resident_kib), "{}", stats.ram_resident_kib);
}

#[test]
fn what_the_guest_prints_is_logged() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    let mut vm = Vm::start(&Guest::default().print("kept\n").spin(), |plan| {
        let file = plan.add(File::create(&log).unwrap());
        plan.config.consoles[0].log = Some(file);
    });
    assert_eq!(vm.line(), "kept");
    assert_eq!(vm.ask(Command::Quit), Ok(Reply::Done));
    vm.end();
    assert_eq!(std::fs::read_to_string(log).unwrap(), "kept\n");
}

#[test]
fn a_machine_that_cannot_be_built_says_why_through_the_start() {
    type Change = fn(&mut support::Plan);
    let cases: [(Change, FailureClass, &str); 7] = [
        (|p| p.config.machine = "pc".into(), FailureClass::Config, "machine type 'pc' does not exist"),
        (|p| p.config.memory_kib = 1024, FailureClass::Config, "a guest needs at least"),
        (|p| p.config.memory_kib = u64::MAX, FailureClass::Config, "bytes of memory"),
        (|p| p.config.vcpus = 64, FailureClass::Engine, "soft runs at most 1 vCPUs, not 64"),
        (|p| p.config.monitor = Some(FdIndex(9)), FailureClass::Config, "descriptor 9 for the monitor, but 1 were"),
        (
            |p| p.fds[0] = File::open("/dev/null").unwrap().into(),
            FailureClass::Boot,
            "the kernel is neither a bzImage nor an ELF file",
        ),
        (
            |p| {
                let console = |port| Console {
                    target: ConsoleTarget::Serial { port },
                    file: FdIndex(0),
                    keep_open: None,
                    log: None,
                };
                p.config.consoles = vec![console(1), console(1)];
            },
            FailureClass::Config,
            "serial port 1 is given twice",
        ),
    ];
    for (change, class, text) in cases {
        let directory = tempfile::tempdir().unwrap();
        let mut plan = plan(&Guest::default().power_off(), directory.path());
        change(&mut plan);
        let (mut child, reply) = start(&plan);
        let StartReply::Failed(failure) = reply else { panic!("{text}: {reply:?}") };
        assert_eq!(failure.class, class, "{failure:?}");
        assert!(failure.text.contains(text), "{failure:?}");
        assert!(!child.wait().unwrap().success());
    }
}
