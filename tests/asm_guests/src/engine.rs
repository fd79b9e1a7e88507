//! Runs a guest on an engine of `hv_core`, with the little it needs of a machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering::SeqCst};
use std::sync::mpsc;
use std::time::Duration;

use guest_ram::{Gpa, GuestRam, RamError};
use hv_core::{Accel, AccelError, Clock, GuestNs, Halt, Kick, StopToken, Topology, Vcpu, VcpuIo, Vm};
use parking_lot::Mutex;

use crate::image::BuildError;
use crate::layout::{IMAGE_BYTES, MMIO, MMIO_BYTES, PORT_EXTINT, PORT_MMIO_COUNT, PORT_OUT, PORT_STOP};
use crate::suite::{End, Guest, Need, Outcome, Peer, Ran, Verdict, judge};

/// RAM from 0.
const RAM_BYTES: u64 = 4 << 20;
/// The image stands below 1 MiB and below 4 GiB, as firmware does.
const LOW_IMAGE: u64 = 0xf_0000;
const HIGH_IMAGE: u64 = 0xffff_0000;
/// The longest run.
const LIMIT: Duration = Duration::from_secs(10);
/// Output beyond this is dropped: a guest gone wild prints without end.
const OUTPUT_LIMIT: usize = 64 << 10;

/// Why a guest could not be run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Its image cannot be built.
    #[error("its image cannot be built")]
    Build(#[from] BuildError),
    /// No memory for it.
    #[error("it has no memory")]
    Ram(#[from] RamError),
    /// The engine refused.
    #[error("the engine refused it")]
    Engine(#[from] AccelError),
}

/// Runs `guest` on `accel` and judges it.
pub fn check<A: Accel>(guest: &Guest, accel: &A, ran: Ran, clock: Clock) -> Result<Verdict, RunError> {
    if let Peer::Skipped(why) = guest.peer(ran) {
        return Ok(Verdict::Skipped(why.to_owned()));
    }
    if let Some(need) = missing(guest.needs, &accel.cpuid()) {
        return Ok(Verdict::Skipped(format!("the processor has no {}", need.name)));
    }
    Ok(judge(guest, ran, run(&guest.image()?, accel, clock)?))
}

fn missing<'a>(needs: &'a [Need], cpuid: &x86::CpuidTable) -> Option<&'a Need> {
    needs.iter().find(|need| {
        let words = cpuid.get(need.leaf, 0).map_or([0; 4], |l| [l.eax, l.ebx, l.ecx, l.edx]);
        words[need.word & 3] & 1 << need.bit == 0
    })
}

/// Runs an image to its end.
pub fn run<A: Accel>(image: &[u8], accel: &A, clock: Clock) -> Result<Outcome, RunError> {
    let ram = GuestRam::new(&[(Gpa(0), RAM_BYTES), (Gpa(HIGH_IMAGE), IMAGE_BYTES as u64)])?;
    ram.write(Gpa(LOW_IMAGE), image)?;
    ram.write(Gpa(HIGH_IMAGE), image)?;
    let parts = accel.build(ram, &Topology { vcpus: 1 }, &accel.cpuid(), clock)?;
    let vm = parts.vm;
    let mut vcpus = parts.vcpus;
    let Some(vcpu) = vcpus.first_mut() else {
        return Ok(Outcome { output: String::new(), end: End::Failed("the engine made no vCPU".into()) });
    };
    let stop = StopToken::default();
    let io = TestIo {
        vm: vm.clone(),
        kicker: vcpu.kicker(),
        stop: stop.clone(),
        output: Mutex::default(),
        stopped: AtomicBool::new(false),
        extint: AtomicI32::new(-1),
        mmio: Mutex::new(vec![0; MMIO_BYTES as usize]),
        mmio_count: AtomicU32::new(0),
    };
    let (done, watch) = mpsc::channel::<()>();
    let (halt, late) = std::thread::scope(|scope| {
        let io = &io;
        let watchdog = scope.spawn(move || {
            let late = watch.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout);
            if late {
                io.end();
            }
            late
        });
        let halt = vcpu.run(io, &stop);
        drop(done);
        (halt, watchdog.join().unwrap_or(true))
    });
    let end = match halt {
        Halt::Stop if io.stopped.load(SeqCst) => End::Stop,
        Halt::Stop if late => End::TimedOut,
        Halt::TripleFault => End::TripleFault,
        Halt::InternalError(error) => End::Failed(error.to_string()),
        other => End::Failed(format!("{other:?}")),
    };
    Ok(Outcome { output: String::from_utf8_lossy(&io.output.lock()).into_owned(), end })
}

/// Console, stop port, an 8259 of one vector, a window of memory-mapped I/O.
struct TestIo<M> {
    vm: Arc<M>,
    kicker: Arc<dyn Kick>,
    stop: StopToken,
    output: Mutex<Vec<u8>>,
    stopped: AtomicBool,
    extint: AtomicI32,
    mmio: Mutex<Vec<u8>>,
    mmio_count: AtomicU32,
}

impl<M: Vm> TestIo<M> {
    fn end(&self) {
        self.stop.stop();
        self.kicker.kick();
    }
    /// Bytes of the window at `gpa`.
    fn window(gpa: Gpa, bytes: u8) -> Option<std::ops::Range<usize>> {
        let start = usize::try_from(gpa.0.checked_sub(MMIO as u64)?).ok()?;
        let end = start.checked_add(bytes as usize)?;
        (end <= MMIO_BYTES as usize).then_some(start..end)
    }
}

impl<M: Vm> VcpuIo for TestIo<M> {
    fn port_read(&self, port: u16, bytes: u8) -> u32 {
        match port {
            PORT_OUT if bytes == 1 => 0xe9,
            PORT_MMIO_COUNT => self.mmio_count.load(SeqCst),
            _ => u32::MAX >> (32 - 8 * bytes.clamp(1, 4) as u32),
        }
    }
    fn port_write(&self, port: u16, _bytes: u8, value: u32) {
        match port {
            PORT_OUT => {
                let mut output = self.output.lock();
                if output.len() < OUTPUT_LIMIT {
                    output.push(value as u8);
                }
            }
            PORT_STOP => {
                self.stopped.store(true, SeqCst);
                self.end();
            }
            PORT_EXTINT => {
                self.extint.store((value & 0xff) as i32, SeqCst);
                self.vm.set_extint(true);
            }
            _ => {}
        }
    }
    fn mmio_read(&self, gpa: Gpa, bytes: u8) -> u64 {
        let Some(range) = Self::window(gpa, bytes) else { return u64::MAX };
        self.mmio_count.fetch_add(1, SeqCst);
        self.mmio.lock()[range].iter().rev().fold(0, |value, &byte| value << 8 | byte as u64)
    }
    fn mmio_write(&self, gpa: Gpa, bytes: u8, value: u64) {
        let Some(range) = Self::window(gpa, bytes) else { return };
        self.mmio_count.fetch_add(1, SeqCst);
        let bytes = range.len();
        self.mmio.lock()[range].copy_from_slice(&value.to_le_bytes()[..bytes]);
    }
    fn pic_ack(&self) -> Option<u8> {
        self.vm.set_extint(false);
        u8::try_from(self.extint.swap(-1, SeqCst)).ok()
    }
    fn eoi(&self, _vector: u8) {}
    fn run_due(&self, _now: GuestNs) -> Option<GuestNs> {
        None
    }
}
