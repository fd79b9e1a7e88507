//! The thread that owns a machine: it alone starts, stops, resets and ends it.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hv_core::{Accel, Halt, Lifecycle as _, PowerEvent, Ring as _};
use machine::{Machine, Worker};
use monitor::{Command, DiskThrottle, Event as MonitorEvent, Failure, Reply, ShutdownCause, Stats, VmConfig};
use rustix::event::{PollFd, PollFlags, poll};

use crate::console::HostEnd;
use crate::disk::SharedDisk;
use crate::error::{VmmError, causes};
use crate::event::Event;
use crate::io_thread::{IoParts, IoThread, SerialConsole};
use crate::lifecycle::{Action, Cause, Lifecycle, Policy};
use crate::monitor_server::{Asked, MonitorServer};
use crate::notes::{DiskNote, Note, Notes};
use crate::sandbox::{self, Files};
use crate::setup::Setup;
use crate::signals;
use crate::stats::RunStats;
use crate::throttling::ThrottleGroups;
use crate::vcpu_thread::VcpuThread;
use crate::words::say;

/// Why a machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// As the lifecycle decided.
    Machine(ShutdownCause),
    /// A signal.
    Signal(i32),
    /// The leave key.
    LeaveKey,
}

/// A built machine with its threads, standing.
pub struct Owner {
    machine: Machine,
    vcpus: Vec<VcpuThread>,
    /// At least one.
    io: Vec<IoThread>,
    notes: Arc<Notes>,
    lifecycle: Lifecycle,
    disks: Vec<Arc<SharedDisk>>,
    throttles: ThrottleGroups,
    ends: Vec<Arc<HostEnd>>,
    monitor: MonitorServer,
    signals: &'static Event,
    running: bool,
    /// When a disk failure was last written down.
    failure_said: Option<Instant>,
}

/// What the first I/O thread has beside devices.
struct IoRest {
    serial: Vec<SerialConsole>,
    ends: Vec<Arc<HostEnd>>,
    wake: Arc<Event>,
}

/// Starts the I/O threads and gives each its working halves. Disks come first among the machine's devices.
fn spawn_io(config: &VmConfig, machine: &Machine, rest: IoRest, notes: &Arc<Notes>) -> Result<Vec<IoThread>, VmmError> {
    let number_of = |worker: &Worker| {
        let threads = config.disks.get(worker.device).map_or(&[][..], |disk| &disk.io_threads);
        threads.get(worker.lane % threads.len().max(1)).copied().unwrap_or(0)
    };
    let mut rest = Some(rest);
    let last = machine.workers().iter().map(number_of).max().unwrap_or(0);
    let mut threads = Vec::new();
    for number in 0..=last {
        let workers = machine.workers().iter().filter(|worker| number_of(worker) == number).cloned().collect();
        let failed = VmmError::host("start an I/O thread");
        let own = match rest.take() {
            Some(rest) => rest,
            None => {
                let wake = Arc::new(Event::new().map_err(VmmError::host("make an event descriptor"))?);
                IoRest { serial: Vec::new(), ends: Vec::new(), wake }
            }
        };
        let (board, notes) = (machine.board().clone(), notes.clone());
        let IoRest { serial, ends, wake } = own;
        threads.push(IoThread::spawn(IoParts { number, board, workers, serial, ends, wake, notes }).map_err(failed)?);
    }
    Ok(threads)
}

impl Owner {
    /// Builds the machine on `accel` and starts its threads, which stand.
    pub fn build<A: Accel>(
        accel: &A,
        config: &VmConfig,
        setup: Setup,
        notes: Arc<Notes>,
        signals: &'static Event,
    ) -> Result<Owner, VmmError> {
        let Setup { machine, disks, throttles, serial, ends, monitor, wake } = setup;
        let monitor = MonitorServer::new(monitor, config.uuid.clone()).map_err(VmmError::host("serve the monitor"))?;
        let (mut machine, vcpus) = Machine::build(accel, machine)?;
        let states = machine.reset()?;
        let (stopper, listener_notes) = (machine.stopper().clone(), notes.clone());
        machine.power().listen(move || {
            stopper.stop();
            listener_notes.leave(Note::Power);
        });
        machine.board().clock().pause();
        let io = spawn_io(config, &machine, IoRest { serial, ends: ends.clone(), wake }, &notes)?;
        let mut threads = Vec::new();
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let stop = machine.stopper().token(index).cloned().unwrap_or_default();
            let thread = VcpuThread::spawn(index, vcpu, machine.board().clone(), stop, notes.clone())
                .map_err(VmmError::host("start a vCPU thread"))?;
            threads.push(thread);
        }
        let policy = Policy { on_poweroff: config.on_poweroff, on_reboot: config.on_reboot, on_crash: config.on_crash };
        let lifecycle = Lifecycle::new(policy);
        let mut owner = Owner {
            machine,
            vcpus: threads,
            io,
            notes,
            lifecycle,
            disks,
            throttles,
            ends,
            monitor,
            signals,
            running: false,
            failure_said: None,
        };
        owner.set_states(states)?;
        Ok(owner)
    }

    fn set_states(&mut self, states: Vec<x86::State>) -> Result<(), VmmError> {
        for (index, (vcpu, state)) in self.vcpus.iter_mut().zip(states).enumerate() {
            vcpu.set_state(state).map_err(|source| VmmError::Vcpu { index, source })?;
        }
        Ok(())
    }

    /// Gives up files and system calls, on every thread, before anything runs. [`Files::NotEnforced`]: the kernel has no
    /// Landlock, and the system call filter alone keeps files away.
    pub fn confine(&mut self) -> Result<Files, VmmError> {
        for io in &self.io {
            io.deny_files()?;
        }
        for vcpu in &mut self.vcpus {
            vcpu.deny_files()?;
        }
        let files = sandbox::deny_files()?;
        sandbox::filter_system_calls()?;
        Ok(files)
    }

    /// Runs the machine until it ends.
    pub fn run(&mut self, paused: bool) -> Result<End, VmmError> {
        if !paused && let Some(end) = self.apply(Cause::Cont)? {
            return Ok(end);
        }
        loop {
            self.wait();
            if let Some(number) = signals::caught() {
                self.halt();
                return Ok(End::Signal(number));
            }
            for note in self.notes.take() {
                if let Some(end) = self.act_on(note)? {
                    return Ok(end);
                }
            }
            for asked in self.monitor.turn() {
                if let Some(end) = self.obey(asked)? {
                    return Ok(end);
                }
            }
        }
    }

    fn wait(&self) {
        let mut fds = vec![
            PollFd::new(self.notes.bell(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.signals.as_fd(), PollFlags::IN),
        ];
        self.monitor.poll_fds(&mut fds);
        // Interrupted by a signal or not: the loop looks at everything.
        let _ = poll(&mut fds, None);
    }

    fn obey(&mut self, asked: Asked) -> Result<Option<End>, VmmError> {
        let Asked { peer, request } = asked;
        let cause = match request.command {
            Command::QueryStatus => {
                let status = Reply::Status(self.lifecycle.status());
                self.monitor.answer(peer, request.id, Ok(status));
                return Ok(None);
            }
            Command::QueryStats => {
                let stats = Reply::Stats(self.monitor_stats());
                self.monitor.answer(peer, request.id, Ok(stats));
                return Ok(None);
            }
            Command::InjectNmi => {
                self.machine.board().inject_nmi();
                self.monitor.answer(peer, request.id, Ok(Reply::Done));
                return Ok(None);
            }
            Command::SetDiskThrottle { target, throttle } => {
                let done = self.set_throttle(&target, &throttle);
                self.monitor.answer(peer, request.id, done.map(|()| Reply::Done).map_err(|error| error.failure()));
                return Ok(None);
            }
            Command::ResizeDisk { target, bytes } => {
                let done = self.resize_disk(&target, bytes);
                self.monitor.answer(peer, request.id, done.map(|()| Reply::Done).map_err(|error| error.failure()));
                return Ok(None);
            }
            Command::Cont => Cause::Cont,
            Command::Stop => Cause::Stop,
            Command::SystemPowerdown => Cause::PowerButton,
            Command::SystemReset => Cause::Reset,
            Command::Quit => Cause::Quit,
        };
        let quits = cause == Cause::Quit;
        let actions = match self.lifecycle.apply(cause) {
            Ok(actions) => actions,
            Err(failure) => {
                self.monitor.answer(peer, request.id, Err(failure));
                return Ok(None);
            }
        };
        if quits {
            self.monitor.answer(peer, request.id, Ok(Reply::Done));
        }
        let performed = self.perform(actions);
        let failure: Option<Failure> = performed.as_ref().err().map(VmmError::failure);
        if !quits {
            self.monitor.answer(peer, request.id, failure.map_or(Ok(Reply::Done), Err));
        }
        performed
    }

    fn disk(&self, target: &str) -> Result<&Arc<SharedDisk>, VmmError> {
        let found = self.disks.iter().find(|disk| disk.target() == target);
        found.ok_or_else(|| VmmError::NoDisk { target: target.into() })
    }

    /// Changes the size of a disk. The machine stands for that moment: nothing is in flight, and the guest sees old and new
    /// in one order only.
    fn resize_disk(&mut self, target: &str, bytes: u64) -> Result<(), VmmError> {
        let disk = self.disk(target)?.clone();
        let ran = self.running;
        self.halt();
        let resized = disk.resize(bytes);
        if resized.is_ok() {
            self.machine.workers().iter().for_each(|worker| worker.work.lock().back_end_changed());
        }
        if ran {
            self.go();
        }
        resized.map_err(|source| VmmError::Resize { target: target.into(), source })
    }

    fn set_throttle(&self, target: &str, throttle: &DiskThrottle) -> Result<(), VmmError> {
        let wrong = |source| VmmError::Throttle { target: target.into(), source };
        self.throttles.change(self.disk(target)?.limits(), throttle).map_err(wrong)?;
        // Who waits under the old limits asks again.
        self.machine.workers().iter().for_each(|worker| worker.bell.ring());
        Ok(())
    }

    fn monitor_stats(&self) -> Stats {
        let resident = self.machine.ram().resident_bytes();
        Stats {
            vcpus: self.vcpus.iter().map(VcpuThread::stats).collect(),
            disks: self.disks.iter().map(|disk| disk.stats()).collect(),
            ram_resident_kib: resident / 1024,
        }
    }

    fn act_on(&mut self, note: Note) -> Result<Option<End>, VmmError> {
        match note {
            Note::LeaveKey => {
                self.halt();
                return Ok(Some(End::LeaveKey));
            }
            Note::Vcpu => {
                for index in 0..self.vcpus.len() {
                    let halt = self.vcpus.get_mut(index).and_then(VcpuThread::try_halted);
                    if let Some(end) = halt.map(|halt| self.vcpu_halted(index, halt)).transpose()?.flatten() {
                        return Ok(Some(end));
                    }
                }
            }
            Note::Power => {
                let cause = match self.machine.power().take() {
                    Some(PowerEvent::PowerOff) => Cause::GuestPowerOff,
                    Some(PowerEvent::Reset) => Cause::GuestReset,
                    Some(PowerEvent::Panicked) => Cause::Crash("the guest reports a panic".into()),
                    Some(PowerEvent::IoErrorPause) => Cause::DiskHeld,
                    None => return Ok(None),
                };
                return self.apply(cause);
            }
            Note::Disk(disk) => {
                self.say_once_a_second(&disk);
                self.emit(&MonitorEvent::IoError {
                    target: disk.target,
                    operation: disk.operation.into(),
                    reason: if disk.no_space { "enospc".into() } else { String::new() },
                    paused: disk.held,
                });
                if disk.held {
                    return self.apply(Cause::DiskHeld);
                }
            }
            Note::Signal(number) => {
                self.halt();
                return Ok(Some(End::Signal(number)));
            }
        }
        Ok(None)
    }

    fn vcpu_halted(&mut self, index: usize, halt: Halt) -> Result<Option<End>, VmmError> {
        match halt {
            // Asked for, by a power event that has a note of its own.
            Halt::Stop => Ok(None),
            Halt::TripleFault => {
                self.machine.power().request(PowerEvent::Reset);
                Ok(None)
            }
            Halt::Debug => self.apply(Cause::Crash(format!("vCPU {index} stopped for a debugger, and there is none"))),
            Halt::InternalError(error) => self.apply(Cause::Crash(format!("vCPU {index} cannot go on: {error}"))),
        }
    }

    /// Carries out what follows from `cause`. One that does not fit the run state is the past's, and has no effect.
    fn apply(&mut self, cause: Cause) -> Result<Option<End>, VmmError> {
        match self.lifecycle.apply(cause) {
            Ok(actions) => self.perform(actions),
            Err(_) => Ok(None),
        }
    }

    fn perform(&mut self, actions: Vec<Action>) -> Result<Option<End>, VmmError> {
        for action in actions {
            match action {
                Action::Halt => self.halt(),
                Action::Run => self.go(),
                Action::Reset => {
                    let states = self.machine.reset()?;
                    self.set_states(states)?;
                }
                Action::PressPower => self.machine.board().press_power_button(),
                Action::Emit(event) => self.emit(&event),
                Action::End(cause) => return Ok(Some(End::Machine(cause))),
            }
        }
        Ok(None)
    }

    /// A guest whose every request fails must not fill the log.
    fn say_once_a_second(&mut self, disk: &DiskNote) {
        if self.failure_said.is_none_or(|said| said.elapsed() > Duration::from_secs(1)) {
            self.failure_said = Some(Instant::now());
            say(format_args!("disk {}: {} failed: {}", disk.target, disk.operation, disk.text));
        }
    }

    fn emit(&mut self, event: &MonitorEvent) {
        if let MonitorEvent::Crashed { text } = event {
            say(text);
        }
        self.monitor.tell_all(event);
    }

    /// vCPUs, I/O thread and clock stand.
    fn halt(&mut self) {
        if !self.running {
            return;
        }
        self.running = false;
        self.machine.stopper().stop();
        self.vcpus.iter_mut().for_each(|vcpu| drop(vcpu.wait_halted()));
        self.io.iter().for_each(IoThread::pause);
        self.machine.board().clock().pause();
    }

    /// They go on.
    fn go(&mut self) {
        if self.running {
            return;
        }
        self.running = true;
        self.machine.board().clock().resume();
        self.machine.stopper().clear();
        self.machine.resume_workers();
        self.io.iter().for_each(IoThread::resume);
        self.vcpus.iter_mut().for_each(VcpuThread::run);
    }

    /// Brings what the guest printed and wrote to the host. The machine stands.
    pub fn finish(&mut self) {
        self.halt();
        self.machine.board().flush_serial();
        self.ends.iter().for_each(|end| end.flush());
        for disk in &self.disks {
            if let Err(error) = disk.flush() {
                say(format_args!("disk {}: the last flush failed: {}", disk.target(), causes(&error)));
            }
        }
        self.monitor.farewell();
    }

    /// Counters; complete when the machine stands.
    pub fn stats(&self) -> RunStats {
        RunStats {
            instructions: self.vcpus.iter().map(VcpuThread::instructions).sum(),
            exits: self.machine.board().exits(),
            console_bytes: self.ends.iter().map(|end| end.printed_bytes()).sum(),
            guest_ns: self.machine.board().clock().now().0,
        }
    }
}
