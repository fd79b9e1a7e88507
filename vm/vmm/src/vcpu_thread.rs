//! A thread that executes one vCPU.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use hv_core::{AccelError, Halt, StopToken, Vcpu};
use machine::Board;
use monitor::VcpuStats;

use crate::notes::{Note, Notes};
use crate::sandbox::{self, Files, SandboxError};

enum Order {
    Run,
    SetState(Box<x86::State>),
    DenyFiles,
}

enum Answer {
    Halted(Halt),
    StateSet(Result<(), AccelError>),
    FilesDenied(Result<Files, SandboxError>),
}

/// Files of the thread in /proc, opened before the sandbox closes.
#[derive(Debug)]
struct ThreadFiles {
    thread_id: u32,
    stat: Option<File>,
    schedstat: Option<File>,
}

/// The thread, as the owner has it.
pub struct VcpuThread {
    orders: Option<Sender<Order>>,
    answers: Receiver<Answer>,
    running: bool,
    instructions: Arc<AtomicU64>,
    files: ThreadFiles,
    thread: Option<JoinHandle<()>>,
}

impl VcpuThread {
    /// Starts a thread for `vcpu`, which waits for orders.
    pub fn spawn<V: Vcpu>(
        index: usize,
        mut vcpu: V,
        board: Arc<Board>,
        stop: StopToken,
        notes: Arc<Notes>,
    ) -> io::Result<VcpuThread> {
        let (orders, receiver) = channel();
        let (sender, answers) = channel();
        let (told_id, id) = channel();
        let instructions = Arc::<AtomicU64>::default();
        let retired = instructions.clone();
        let thread = std::thread::Builder::new().name(format!("vcpu{index}")).spawn(move || {
            let _ = told_id.send(rustix::thread::gettid());
            // Ends when the owner drops its side.
            for order in receiver {
                let answer = match order {
                    Order::Run => {
                        let halt = vcpu.run(&*board, &stop);
                        retired.store(vcpu.instructions().unwrap_or(0), Ordering::Relaxed);
                        Answer::Halted(halt)
                    }
                    Order::SetState(state) => Answer::StateSet(vcpu.set_state(&state)),
                    Order::DenyFiles => Answer::FilesDenied(sandbox::deny_files()),
                };
                let halted = matches!(answer, Answer::Halted(_));
                let _ = sender.send(answer);
                if halted {
                    notes.leave(Note::Vcpu);
                }
            }
        })?;
        let thread_id = id.recv().map_err(|_| io::ErrorKind::UnexpectedEof)?.as_raw_nonzero().get();
        let open = |name| File::open(format!("/proc/self/task/{thread_id}/{name}")).ok();
        let files =
            ThreadFiles { thread_id: thread_id.unsigned_abs(), stat: open("stat"), schedstat: open("schedstat") };
        Ok(VcpuThread { orders: Some(orders), answers, running: false, instructions, files, thread: Some(thread) })
    }

    fn order(&self, order: Order) {
        // A vCPU thread ends only with the process.
        if let Some(orders) = &self.orders {
            let _ = orders.send(order);
        }
    }
    /// Lets it run, if it stands.
    pub fn run(&mut self) {
        if !self.running {
            self.running = true;
            self.order(Order::Run);
        }
    }
    /// Why the vCPU has returned by itself, if it has.
    pub fn try_halted(&mut self) -> Option<Halt> {
        match self.answers.try_recv() {
            Ok(Answer::Halted(halt)) => {
                self.running = false;
                Some(halt)
            }
            _ => None,
        }
    }
    /// Waits until the vCPU stands; its stop token is set. What it returned with, if it ran.
    pub fn wait_halted(&mut self) -> Option<Halt> {
        while self.running {
            match self.answers.recv() {
                Ok(Answer::Halted(halt)) => {
                    self.running = false;
                    return Some(halt);
                }
                Ok(Answer::StateSet(_) | Answer::FilesDenied(_)) => {}
                Err(_) => self.running = false,
            }
        }
        None
    }
    /// Replaces the state of a vCPU that stands.
    pub fn set_state(&mut self, state: x86::State) -> Result<(), AccelError> {
        self.order(Order::SetState(Box::new(state)));
        match self.answers.recv() {
            Ok(Answer::StateSet(result)) => result,
            _ => Ok(()),
        }
    }

    /// Takes the file system away from the thread, which stands. See [`sandbox::deny_files`].
    pub fn deny_files(&mut self) -> Result<Files, SandboxError> {
        self.order(Order::DenyFiles);
        match self.answers.recv() {
            Ok(Answer::FilesDenied(result)) => result,
            _ => Ok(Files::NotEnforced),
        }
    }

    /// Instructions retired up to the last time the vCPU stood.
    pub fn instructions(&self) -> u64 {
        self.instructions.load(Ordering::Relaxed)
    }
    /// What the host says about the thread.
    pub fn stats(&self) -> VcpuStats {
        let ThreadFiles { thread_id, stat, schedstat } = &self.files;
        let read = |file: &Option<File>| {
            let mut buffer = [0; 512];
            let bytes = file.as_ref()?.read_at(&mut buffer, 0).ok()?;
            Some(String::from_utf8_lossy(buffer.get(..bytes)?).into_owned())
        };
        // proc(5): the state follows the command name, which is in parentheses.
        let halted =
            read(stat).is_some_and(|text| text.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('S')));
        let cpu_ns = read(schedstat).and_then(|text| text.split(' ').next()?.parse().ok()).unwrap_or(0);
        VcpuStats { thread_id: *thread_id, cpu_ns, halted: halted && self.running }
    }
}

impl Drop for VcpuThread {
    /// Waits for the thread, whose vCPU stands.
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
