//! The run loop of a software vCPU.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hv_core::{AccelError, GuestNs, Halt, InternalError, Kick, StopToken, Vcpu, VcpuIo};
use x86::State;

use crate::cache::{Block, BlockCache};
use crate::cpu::{BLOCK_RIP, CS, Cpu, Io, Op, Stop, attention, rf};
use crate::exception::{Event, Kind};
use crate::mailbox::{self, Kicker};
use crate::native::Native;

/// Host clock: how many instructions may pass before the vCPU looks at the time again.
const LOOK_EVERY: u64 = 16 * 1024;

/// One vCPU of the software CPU.
pub struct SoftVcpu {
    pub(crate) cpu: Box<Cpu>,
    pub(crate) cache: BlockCache,
    pub(crate) native: Native,
}

impl SoftVcpu {
    fn run_loop(&mut self, io: Io<'_>, stop: &StopToken) -> Halt {
        self.cpu.mailbox.runs_on(std::thread::current());
        self.cpu.look_at_clock = 0;
        if stop.is_stopped() {
            return Halt::Stop;
        }
        loop {
            let cpu = &mut *self.cpu;
            let events = cpu.mailbox.events.load(Ordering::Relaxed);
            if cpu.attention | events != 0 || cpu.icount >= cpu.look_at_clock || cpu.halted {
                match self.service(io, stop) {
                    Service::Go => {}
                    Service::Step => {
                        if let Err(halt) = self.single_step(io) {
                            return halt;
                        }
                        continue;
                    }
                    Service::One => {
                        if let Err(halt) = self.one(io) {
                            return halt;
                        }
                        continue;
                    }
                    Service::Leave(halt) => return halt,
                }
            }
            let block = match self.cache.lookup(&mut self.cpu, &mut self.native) {
                Ok(block) => block,
                Err(stop) => {
                    if let Err(halt) = self.fetch_failed(io, stop) {
                        return halt;
                    }
                    continue;
                }
            };
            if let Err(halt) = self.execute(io, block) {
                return halt;
            }
        }
    }

    #[inline(always)]
    fn execute(&mut self, io: Io<'_>, block: Block) -> Result<(), Halt> {
        let cpu = &mut *self.cpu;
        cpu.gpr[BLOCK_RIP as usize] = cpu.rip;
        let ops = self.cache.ops(block);
        for (index, op) in ops.iter().enumerate() {
            if let Err(stop) = (op.run)(cpu, op, io) {
                let instructions = block.instructions as usize;
                if stop == Stop::Branch {
                    cpu.icount += (index + 1).min(instructions) as u64;
                    return Ok(());
                }
                return stopped(cpu, io, stop, op, index as u64);
            }
        }
        Ok(())
    }

    fn fetch_failed(&mut self, io: Io<'_>, stop: Stop) -> Result<(), Halt> {
        match stop {
            Stop::Fault => self.cpu.deliver_fault(io),
            _ => Err(Halt::InternalError(self.cpu.internal_error())),
        }
    }

    /// One instruction, behind which an interrupt waits.
    fn one(&mut self, io: Io<'_>) -> Result<(), Halt> {
        match self.cache.single(&mut self.cpu, &mut self.native) {
            Ok(block) => self.execute(io, block),
            Err(stop) => self.fetch_failed(io, stop),
        }
    }

    /// One instruction with the trap flag set. SDM 3A 17.3.1.4 "Single-Step Exception Condition".
    fn single_step(&mut self, io: Io<'_>) -> Result<(), Halt> {
        let block = match self.cache.single(&mut self.cpu, &mut self.native) {
            Ok(block) => block,
            Err(stop) => return self.fetch_failed(io, stop),
        };
        let faults = self.cpu.faults_delivered;
        self.execute(io, block)?;
        let cpu = &mut *self.cpu;
        // SDM 3A 6.8.3 "Masking Exceptions and Interrupts When Switching Stacks": the next instruction's trap is for both.
        if cpu.faults_delivered == faults && cpu.attention & attention::TRAP_SHADOW == 0 {
            cpu.dr[4] |= 1 << 14;
            cpu.deliver(io, Event { vector: 1, error: None, kind: Kind::Exception }, cpu.rip)?;
        }
        Ok(())
    }

    /// Everything that is not executing instructions.
    #[cold]
    #[inline(never)]
    fn service(&mut self, io: Io<'_>, stop: &StopToken) -> Service {
        loop {
            let cpu = &mut *self.cpu;
            let events = cpu.mailbox.events.swap(0, Ordering::SeqCst);
            if events & mailbox::KICK != 0 && stop.is_stopped() {
                return Service::Leave(Halt::Stop);
            }
            if events & (mailbox::IRQ | mailbox::EXTINT) != 0 {
                cpu.lapic.merge(cpu.mailbox.take_requests());
                cpu.update_interrupt();
            }
            if events & mailbox::CODE != 0 {
                for page in cpu.mailbox.take_written_code() {
                    self.cache.invalidate(cpu, page, guest_ram::PAGE_BYTES);
                }
            }
            if cpu.attention & attention::CODE != 0 {
                cpu.attention &= !attention::CODE;
                for (gpa, bytes) in std::mem::take(&mut cpu.code_map.hits) {
                    self.cache.invalidate(cpu, gpa, bytes);
                }
            }
            if cpu.icount >= cpu.look_at_clock {
                cpu.look_at_clock(io);
            }
            if cpu.attention & attention::SHADOW != 0 {
                cpu.attention &= !(attention::SHADOW | attention::TRAP_SHADOW);
                return if cpu.attention & attention::STEP != 0 {
                    Service::Step
                } else if cpu.attention & attention::INTERRUPT != 0 {
                    Service::One
                } else {
                    Service::Go
                };
            }
            if cpu.attention & attention::INTERRUPT != 0
                && let Err(halt) = cpu.interrupt(io)
            {
                return Service::Leave(halt);
            }
            if cpu.halted {
                cpu.wait(io);
                continue;
            }
            return if cpu.attention & attention::STEP != 0 { Service::Step } else { Service::Go };
        }
    }
}

enum Service {
    Go,
    One,
    Step,
    Leave(Halt),
}

/// The end of a block other than by a branch.
#[cold]
#[inline(never)]
fn stopped(cpu: &mut Cpu, io: Io<'_>, stop: Stop, op: &Op, done: u64) -> Result<(), Halt> {
    let next = cpu.next_rip(op);
    let start = cpu.wrap_rip(cpu.gpr[BLOCK_RIP as usize].wrapping_add((op.next - op.len as u16) as u64));
    let completes = !matches!(stop, Stop::Fault | Stop::Again | Stop::Cannot);
    cpu.icount += done + completes as u64;
    cpu.rip = if completes { next } else { start };
    match stop {
        Stop::Branch | Stop::Next | Stop::Again => Ok(()),
        Stop::Fault => cpu.deliver_fault(io),
        Stop::Trap => {
            cpu.faults_delivered += 1;
            let vector = cpu.fault.vector;
            cpu.deliver(io, Event { vector, error: None, kind: Kind::Exception }, next)
        }
        Stop::SoftInt => {
            cpu.faults_delivered += 1;
            let vector = cpu.fault.vector;
            cpu.deliver(io, Event { vector, error: None, kind: Kind::Software }, start)
        }
        Stop::Halt => {
            cpu.halted = true;
            Ok(())
        }
        Stop::Cannot => Err(Halt::InternalError(cpu.internal_error())),
    }
}

impl Cpu {
    /// What could not be executed, and where.
    pub(crate) fn internal_error(&mut self) -> InternalError {
        let pc = self.rip.wrapping_add(self.seg_base[CS]);
        let saved = (self.cr2, self.fault);
        let mut bytes = Vec::new();
        if let Ok(page) = self.fetch_page(pc) {
            let mut buffer = [0u8; 15];
            let room = (guest_ram::PAGE_BYTES - (pc & 0xfff)).min(15) as usize;
            if self.ram.read(hv_core::Gpa(page | pc & 0xfff), &mut buffer[..room]).is_ok() {
                bytes.extend_from_slice(&buffer[..room]);
            }
        }
        (self.cr2, self.fault) = saved;
        InternalError { rip: self.rip, bytes, what: std::mem::take(&mut self.cannot) }
    }

    /// Fires timers that are due and decides when to look again.
    fn look_at_clock(&mut self, io: Io<'_>) {
        let now_ns = self.now_ns();
        let mut device_due = None;
        if self.clock.is_virtual() {
            device_due = io.run_due(GuestNs(now_ns));
        }
        if self.lapic.timer_due_ns.is_some_and(|due| due <= now_ns) {
            self.lapic.timer_fired(now_ns);
            self.update_interrupt();
        }
        self.look_at_clock = if self.clock.is_virtual() {
            let due = [self.lapic.timer_due_ns, device_due.map(|d| d.0)].into_iter().flatten().min();
            due.map_or(u64::MAX, |due| due.saturating_sub(self.clock_skew).max(self.icount + 1))
        } else {
            self.icount + LOOK_EVERY
        };
    }

    /// HLT: sleeps until something happens; with a virtual clock, moves it to the next deadline.
    fn wait(&mut self, io: Io<'_>) {
        let now_ns = self.now_ns();
        if self.clock.is_virtual() {
            let device_due = io.run_due(GuestNs(now_ns));
            let due = [self.lapic.timer_due_ns, device_due.map(|d| d.0)].into_iter().flatten().min();
            match due {
                Some(due) => self.clock_skew += due.saturating_sub(now_ns),
                None => self.mailbox.sleep(None),
            }
        } else {
            let due = self.lapic.timer_due_ns.map(|due| Duration::from_nanos(due.saturating_sub(now_ns)));
            self.mailbox.sleep(due);
        }
        self.look_at_clock = 0;
    }

    /// Delivers the interrupt that is due, NMI first. SDM 3A 6.9 "Prioritization of Concurrent Events".
    fn interrupt(&mut self, io: Io<'_>) -> Result<(), Halt> {
        let rip = self.rip;
        let external = |vector| Event { vector, error: None, kind: Kind::External };
        if !self.nmi_blocked && self.mailbox.take_nmi() {
            self.nmi_blocked = true;
            self.deliver(io, external(2), rip)?;
        } else if self.rflags & rf::IF != 0 {
            let vector = match self.lapic.deliverable() {
                Some(vector) => {
                    self.lapic.accept(vector);
                    Some(vector)
                }
                None if self.extint_wanted() => io.pic_ack(),
                None => None,
            };
            if let Some(vector) = vector {
                self.interrupts += 1;
                self.deliver(io, external(vector), rip)?;
            }
        }
        self.update_interrupt();
        Ok(())
    }
}

impl Vcpu for SoftVcpu {
    fn run<I: VcpuIo>(&mut self, io: &I, stop: &StopToken) -> Halt {
        self.run_loop(io, stop)
    }
    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::new(Kicker(self.cpu.mailbox.clone()))
    }
    fn state(&mut self) -> Result<State, AccelError> {
        Ok(self.cpu.save())
    }
    fn set_state(&mut self, state: &State) -> Result<(), AccelError> {
        self.cpu.restore(state)?;
        self.cache.flush(&mut self.cpu);
        Ok(())
    }
    fn instructions(&self) -> Option<u64> {
        Some(self.cpu.icount)
    }
}
