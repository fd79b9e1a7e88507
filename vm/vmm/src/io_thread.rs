//! The threads that run queues, consoles and timers.
//!
//! There is always one, `io0`, which has the consoles and the board's timers. A disk's queues may be given to others: each
//! lane of a disk (a share of its queues, with its own view of the disk) belongs to exactly one thread, so that lanes
//! work at the same time and no queue is ever locked. All threads stand before the owner changes the machine.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use hv_core::{Clock, GuestNs, Interest, Ring};
use machine::{Alarm, Board, Worker};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime};
use smallvec::{SmallVec, smallvec};

use crate::console::{HostEnd, Input};
use crate::event::{self, Event};
use crate::notes::{Note, Notes};
use crate::sandbox::{self, Files, SandboxError};

/// Input read at once; the most a 16550 takes is 16.
const INPUT_BYTES: usize = 256;

/// A serial port and its host end.
pub struct SerialConsole {
    /// Which port.
    pub number: usize,
    /// The host's end.
    pub end: Arc<HostEnd>,
    /// The byte with which a person at a terminal leaves.
    pub leave_key: Option<u8>,
}

/// What a thread works on.
pub struct IoParts {
    /// Its number; 0 has the board's timers.
    pub number: u16,
    /// The board.
    pub board: Arc<Board>,
    /// Working halves.
    pub workers: Vec<Worker>,
    /// Serial consoles.
    pub serial: Vec<SerialConsole>,
    /// Every console, for output that waits.
    pub ends: Vec<Arc<HostEnd>>,
    /// Wakes the thread; consoles have it too.
    pub wake: Arc<Event>,
    /// Where the leave key is reported.
    pub notes: Arc<Notes>,
}

enum Order {
    /// Stand still; answer when it is so.
    Pause,
    /// Take the file system away from the thread; answered over the sender.
    DenyFiles(SyncSender<Result<Files, SandboxError>>),
    Resume,
    End,
}

/// The thread, as the owner has it. It starts paused.
pub struct IoThread {
    orders: SyncSender<Order>,
    paused: Receiver<()>,
    wake: Arc<Event>,
    thread: Option<JoinHandle<()>>,
}

impl IoThread {
    /// Starts the thread.
    pub fn spawn(parts: IoParts) -> io::Result<IoThread> {
        let (orders, receiver) = sync_channel(1);
        let (answers, paused) = sync_channel(1);
        let (wake, number) = (parts.wake.clone(), parts.number);
        let mut io = IoLoop::new(parts, receiver, answers)?;
        let thread = std::thread::Builder::new().name(format!("io{number}")).spawn(move || io.run())?;
        Ok(IoThread { orders, paused, wake, thread: Some(thread) })
    }
    fn order(&self, order: Order) {
        // A thread that has ended takes no orders; its panic has ended the process.
        let _ = self.orders.send(order);
        self.wake.set();
    }
    /// Returns when the thread touches nothing any more.
    pub fn pause(&self) {
        self.order(Order::Pause);
        let _ = self.paused.recv();
    }
    /// Takes the file system away from the thread, which is paused. See [`sandbox::deny_files`].
    pub fn deny_files(&self) -> Result<Files, SandboxError> {
        let (sender, answer) = sync_channel(1);
        self.order(Order::DenyFiles(sender));
        answer.recv().unwrap_or(Ok(Files::NotEnforced))
    }
    /// Lets it go on.
    pub fn resume(&self) {
        self.order(Order::Resume);
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.order(Order::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A timer that is set to the earliest deadline of the board.
struct DeadlineTimer {
    timer: Arc<OwnedFd>,
    clock: Clock,
}

impl Alarm for DeadlineTimer {
    fn set(&self, due: GuestNs) {
        let value = if due == GuestNs::NEVER {
            Duration::ZERO // disarms
        } else {
            Duration::from_nanos(due.since(self.clock.now()).max(1))
        };
        let spec = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec { tv_sec: value.as_secs() as i64, tv_nsec: value.subsec_nanos().into() },
        };
        // Setting a timer to a valid time does not fail.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec);
    }
}

/// A working half with the descriptor it waits for.
struct Waiting {
    worker: Worker,
    fd: Option<OwnedFd>,
    /// Readable when something that the device began is over.
    over_fd: Option<OwnedFd>,
    interest: Interest,
}

impl Waiting {
    fn new(worker: Worker) -> io::Result<Waiting> {
        let work = worker.work.lock();
        let owned = |fd: Option<BorrowedFd<'_>>| fd.map(|fd| fd.try_clone_to_owned()).transpose();
        let (fd, over_fd) = (owned(work.fd())?, owned(work.over_fd())?);
        drop(work);
        Ok(Waiting { worker, fd, over_fd, interest: Interest::default() })
    }
    fn flags(&self) -> PollFlags {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, self.interest.readable);
        flags.set(PollFlags::OUT, self.interest.writable);
        flags
    }
    fn rung(&mut self) {
        event::clear(self.worker.bell.event());
        let mut work = self.worker.work.lock();
        if !self.worker.bell.is_inline() {
            work.work();
        }
        self.interest = work.interest();
    }
    fn ready(&mut self) {
        if self.worker.bell.is_inline() {
            self.worker.bell.ring();
            self.interest = self.worker.work.lock().interest();
        } else {
            let mut work = self.worker.work.lock();
            work.work();
            self.interest = work.interest();
        }
    }
}

/// A serial console and input that the port had no room for.
struct Feeding {
    console: SerialConsole,
    pending: Vec<u8>,
}

struct IoLoop {
    board: Arc<Board>,
    /// The board's deadlines are this thread's.
    has_timers: bool,
    timer: Arc<OwnedFd>,
    workers: Vec<Waiting>,
    serial: Vec<Feeding>,
    ends: Vec<Arc<HostEnd>>,
    wake: Arc<Event>,
    notes: Arc<Notes>,
    orders: Receiver<Order>,
    answers: SyncSender<()>,
}

/// What became ready, by its place in the list that was polled.
#[derive(Clone, Copy)]
enum Source {
    Wake,
    Timer,
    Bell(usize),
    Back(usize),
    Input(usize),
    Output(usize),
}

impl IoLoop {
    fn new(parts: IoParts, orders: Receiver<Order>, answers: SyncSender<()>) -> io::Result<IoLoop> {
        let IoParts { number, board, workers, serial, ends, wake, notes } = parts;
        let timer =
            Arc::new(timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?);
        let has_timers = number == 0;
        if has_timers && !board.clock().is_virtual() {
            board.set_alarm(Box::new(DeadlineTimer { timer: timer.clone(), clock: board.clock().clone() }));
        }
        let workers = workers.into_iter().map(Waiting::new).collect::<io::Result<_>>()?;
        let serial = serial.into_iter().map(|console| Feeding { console, pending: Vec::new() }).collect();
        Ok(IoLoop { board, has_timers, timer, workers, serial, ends, wake, notes, orders, answers })
    }

    fn run(&mut self) {
        if !self.stand() {
            return;
        }
        let mut ready = Vec::new();
        loop {
            self.wait(&mut ready);
            for &source in &ready {
                match source {
                    Source::Wake => {
                        self.wake.clear();
                        if !self.obey() {
                            return;
                        }
                        self.feed_all();
                    }
                    Source::Timer => {
                        event::clear(self.timer.as_fd());
                        self.board.run_deadlines(self.board.clock().now());
                        self.board.rearm();
                    }
                    Source::Bell(i) => self.workers.get_mut(i).into_iter().for_each(Waiting::rung),
                    Source::Back(i) => self.workers.get_mut(i).into_iter().for_each(Waiting::ready),
                    Source::Input(i) => self.read_input(i),
                    Source::Output(i) => self.ends.get(i).into_iter().for_each(|end| end.flush()),
                }
            }
        }
    }

    /// Carries out what the owner ordered. False: end.
    fn obey(&mut self) -> bool {
        match self.orders.try_recv() {
            Ok(Order::Pause) => {
                self.workers.iter().for_each(|waiting| waiting.worker.work.lock().settle());
                let _ = self.answers.send(());
                self.stand()
            }
            Ok(Order::DenyFiles(answer)) => {
                let _ = answer.send(sandbox::deny_files());
                true
            }
            Ok(Order::Resume) | Err(TryRecvError::Empty) => true,
            Ok(Order::End) | Err(TryRecvError::Disconnected) => false,
        }
    }

    /// Waits until the owner lets the thread go on. False: end.
    fn stand(&mut self) -> bool {
        loop {
            match self.orders.recv() {
                Ok(Order::Resume) => break,
                Ok(Order::Pause) => drop(self.answers.send(())),
                Ok(Order::DenyFiles(answer)) => drop(answer.send(sandbox::deny_files())),
                Ok(Order::End) | Err(_) => return false,
            }
        }
        if self.has_timers {
            self.board.rearm();
        }
        for waiting in &mut self.workers {
            waiting.interest = waiting.worker.work.lock().interest();
        }
        self.feed_all();
        true
    }

    fn wait(&self, ready: &mut Vec<Source>) {
        // Room for what a thread usually has, so that a wait takes no memory.
        let mut sources: SmallVec<[Source; 16]> = smallvec![Source::Wake, Source::Timer];
        let mut fds: SmallVec<[PollFd<'_>; 16]> =
            smallvec![PollFd::new(&*self.wake, PollFlags::IN), PollFd::new(&*self.timer, PollFlags::IN)];
        for (i, waiting) in self.workers.iter().enumerate() {
            sources.push(Source::Bell(i));
            fds.push(PollFd::from_borrowed_fd(waiting.worker.bell.event(), PollFlags::IN));
            if let Some(fd) = waiting.fd.as_ref().filter(|_| !waiting.flags().is_empty()) {
                sources.push(Source::Back(i));
                fds.push(PollFd::new(fd, waiting.flags()));
            }
            if let Some(fd) = &waiting.over_fd {
                sources.push(Source::Back(i));
                fds.push(PollFd::new(fd, PollFlags::IN));
            }
        }
        for (i, feeding) in self.serial.iter().enumerate() {
            if let Some(fd) = feeding.console.end.input().filter(|_| feeding.pending.is_empty()) {
                sources.push(Source::Input(i));
                fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
            }
        }
        for (i, end) in self.ends.iter().enumerate() {
            if let Some(fd) = end.waiting_output() {
                sources.push(Source::Output(i));
                fds.push(PollFd::from_borrowed_fd(fd, PollFlags::OUT));
            }
        }
        ready.clear();
        if poll(&mut fds, None).is_ok() {
            let woken = sources.iter().zip(&fds).filter(|(_, fd)| !fd.revents().is_empty());
            ready.extend(woken.map(|(&source, _)| source));
        }
    }

    fn read_input(&mut self, index: usize) {
        let Some(feeding) = self.serial.get_mut(index) else { return };
        let mut buffer = [0; INPUT_BYTES];
        if let Input::Bytes(bytes) = feeding.console.end.read(&mut buffer) {
            let mut input = buffer.get(..bytes).unwrap_or(&[]);
            if let Some(key) = feeding.console.leave_key
                && let Some(at) = input.iter().position(|&byte| byte == key)
            {
                self.notes.leave(Note::LeaveKey);
                input = input.get(..at).unwrap_or(&[]);
            }
            feeding.pending.extend_from_slice(input);
        }
        self.feed(index);
    }

    /// Gives the port what it has room for.
    fn feed(&mut self, index: usize) {
        let Some(feeding) = self.serial.get_mut(index) else { return };
        let taken = self.board.serial_receive(feeding.console.number, &feeding.pending);
        feeding.pending.drain(..taken);
    }
    fn feed_all(&mut self) {
        for index in 0..self.serial.len() {
            if self.serial.get(index).is_some_and(|feeding| !feeding.pending.is_empty()) {
                self.feed(index);
            }
        }
    }
}
