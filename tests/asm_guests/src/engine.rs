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
    /// The engine made a machine of one vCPU without it.
    #[error("the engine made no vCPU")]
    NoVcpu,
    /// The engine refused.
    #[error("the engine refused it")]
    Engine(#[from] AccelError),
}

/// How the run goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From reset to the end.
    Straight,
    /// At every character printed, the machine is replaced by one that starts with the first one's memory and CPU state.
    Restored,
}

/// Runs `guest` on `accel` and judges it.
pub fn check<A: Accel>(guest: &Guest, accel: &A, ran: Ran, clock: Clock, way: Way) -> Result<Verdict, RunError> {
    if let Peer::Skipped(why) = guest.peer(ran) {
        return Ok(Verdict::Skipped(why.to_owned()));
    }
    if let Some(need) = missing(guest.needs, &accel.cpuid()) {
        return Ok(Verdict::Skipped(format!("the processor has no {}", need.name)));
    }
    Ok(judge(guest, ran, run(&guest.image()?, accel, clock, way)?))
}

fn missing<'a>(needs: &'a [Need], cpuid: &x86::CpuidTable) -> Option<&'a Need> {
    needs.iter().find(|need| {
        let words = cpuid.get(need.leaf, 0).map_or([0; 4], |l| [l.eax, l.ebx, l.ecx, l.edx]);
        words[need.word & 3] & 1 << need.bit == 0
    })
}

/// Runs an image to its end.
pub fn run<A: Accel>(image: &[u8], accel: &A, clock: Clock, way: Way) -> Result<Outcome, RunError> {
    let ram = GuestRam::new(&[(Gpa(0), RAM_BYTES), (Gpa(HIGH_IMAGE), IMAGE_BYTES as u64)])?;
    ram.write(Gpa(LOW_IMAGE), image)?;
    ram.write(Gpa(HIGH_IMAGE), image)?;
    let board = Board::new(way);
    let (done, watch) = mpsc::channel::<()>();
    let ended = std::thread::scope(|scope| {
        let board = &board;
        scope.spawn(move || {
            if watch.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
                board.late.store(true, SeqCst);
                board.end();
            }
        });
        let ended = rounds(accel, &ram, &clock, board);
        drop(done);
        ended
    });
    let end = match ended? {
        Halt::Stop if board.stopped.load(SeqCst) => End::Stop,
        Halt::Stop if board.late.load(SeqCst) => End::TimedOut,
        Halt::TripleFault => End::TripleFault,
        Halt::InternalError(error) => End::Failed(error.to_string()),
        other => End::Failed(format!("{other:?}")),
    };
    Ok(Outcome { output: String::from_utf8_lossy(&board.output.lock()).into_owned(), end })
}

/// Machine after machine, each with the state of the one before, until the guest ends.
fn rounds<A: Accel>(accel: &A, ram: &GuestRam, clock: &Clock, board: &Board) -> Result<Halt, RunError> {
    let mut state = None;
    loop {
        let parts = accel.build(ram.clone(), &Topology { vcpus: 1 }, &accel.cpuid(), clock.clone())?;
        let mut vcpus = parts.vcpus;
        let Some(vcpu) = vcpus.first_mut() else { return Err(RunError::NoVcpu) };
        if let Some(state) = &state {
            vcpu.set_state(state)?;
        }
        *board.kicker.lock() = Some(vcpu.kicker());
        let io = TestIo { vm: parts.vm, board };
        io.vm.set_extint(board.extint.load(SeqCst) >= 0);
        let halt = vcpu.run(&io, &board.stop);
        let over = board.stopped.load(SeqCst) || board.late.load(SeqCst);
        if halt != Halt::Stop || over || board.way == Way::Straight {
            return Ok(halt);
        }
        state = Some(vcpu.state()?);
        board.stop.clear();
        if board.late.load(SeqCst) {
            return Ok(Halt::Stop);
        }
    }
}

/// What outlives a machine: console, stop port, an 8259 of one vector, a window of memory-mapped I/O.
struct Board {
    way: Way,
    kicker: Mutex<Option<Arc<dyn Kick>>>,
    stop: StopToken,
    output: Mutex<Vec<u8>>,
    stopped: AtomicBool,
    late: AtomicBool,
    extint: AtomicI32,
    mmio: Mutex<Vec<u8>>,
    mmio_count: AtomicU32,
}

impl Board {
    fn new(way: Way) -> Board {
        Board {
            way,
            kicker: Mutex::default(),
            stop: StopToken::default(),
            output: Mutex::default(),
            stopped: AtomicBool::new(false),
            late: AtomicBool::new(false),
            extint: AtomicI32::new(-1),
            mmio: Mutex::new(vec![0; MMIO_BYTES as usize]),
            mmio_count: AtomicU32::new(0),
        }
    }
    fn end(&self) {
        self.stop.stop();
        if let Some(kicker) = &*self.kicker.lock() {
            kicker.kick();
        }
    }
}

/// The board as one machine sees it.
struct TestIo<'a, M> {
    vm: Arc<M>,
    board: &'a Board,
}

impl<M: Vm> TestIo<'_, M> {
    /// Bytes of the window at `gpa`.
    fn window(gpa: Gpa, bytes: u8) -> Option<std::ops::Range<usize>> {
        let start = usize::try_from(gpa.0.checked_sub(MMIO as u64)?).ok()?;
        let end = start.checked_add(bytes as usize)?;
        (end <= MMIO_BYTES as usize).then_some(start..end)
    }
}

impl<M: Vm> VcpuIo for TestIo<'_, M> {
    fn port_read(&self, port: u16, bytes: u8) -> u32 {
        match port {
            PORT_OUT if bytes == 1 => 0xe9,
            PORT_MMIO_COUNT => self.board.mmio_count.load(SeqCst),
            _ => u32::MAX >> (32 - 8 * bytes.clamp(1, 4) as u32),
        }
    }
    fn port_write(&self, port: u16, _bytes: u8, value: u32) {
        match port {
            PORT_OUT => {
                let mut output = self.board.output.lock();
                if output.len() < OUTPUT_LIMIT {
                    output.push(value as u8);
                }
                drop(output);
                if self.board.way == Way::Restored {
                    self.board.end();
                }
            }
            PORT_STOP => {
                self.board.stopped.store(true, SeqCst);
                self.board.end();
            }
            PORT_EXTINT => {
                self.board.extint.store((value & 0xff) as i32, SeqCst);
                self.vm.set_extint(true);
            }
            _ => {}
        }
    }
    fn mmio_read(&self, gpa: Gpa, bytes: u8) -> u64 {
        let Some(range) = Self::window(gpa, bytes) else { return u64::MAX };
        self.board.mmio_count.fetch_add(1, SeqCst);
        self.board.mmio.lock()[range].iter().rev().fold(0, |value, &byte| value << 8 | byte as u64)
    }
    fn mmio_write(&self, gpa: Gpa, bytes: u8, value: u64) {
        let Some(range) = Self::window(gpa, bytes) else { return };
        self.board.mmio_count.fetch_add(1, SeqCst);
        let bytes = range.len();
        self.board.mmio.lock()[range].copy_from_slice(&value.to_le_bytes()[..bytes]);
    }
    fn pic_ack(&self) -> Option<u8> {
        self.vm.set_extint(false);
        u8::try_from(self.board.extint.swap(-1, SeqCst)).ok()
    }
    fn eoi(&self, _vector: u8) {}
    fn run_due(&self, _now: GuestNs) -> Option<GuestNs> {
        None
    }
}
