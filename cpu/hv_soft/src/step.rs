//! One instruction at a time, exceptions reported instead of delivered: for debuggers and for comparison with a processor.

use std::sync::atomic::Ordering;

use hv_core::{InternalError, VcpuIo};

use crate::SoftVcpu;
use crate::cpu::{BLOCK_RIP, Cpu, Stop};
use crate::fpu::at;
use crate::mailbox;

/// What a single instruction came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stepped {
    /// It completed (or, a string instruction, made progress: the instruction pointer tells).
    Done,
    /// It raised an exception. Nothing has changed but CR2 for a page fault.
    Exception {
        /// Vector number.
        vector: u8,
        /// Error code, where the vector has one.
        error: Option<u32>,
    },
    /// INT n and the like.
    Interrupt {
        /// Vector number.
        vector: u8,
    },
    /// HLT.
    Halted,
    /// The engine does not implement it.
    Cannot(InternalError),
}

/// The registers that user code sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserRegisters {
    /// General registers by encoding number.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// XSAVE image, standard format, x87, SSE and AVX.
    pub xsave: [u8; 832],
}

impl SoftVcpu {
    /// Replaces what user code sees; translations and decoded blocks stay.
    pub fn set_user_registers(&mut self, registers: &UserRegisters) {
        let cpu = &mut *self.cpu;
        cpu.gpr[..16].copy_from_slice(&registers.gpr);
        cpu.rip = registers.rip;
        cpu.set_full_rflags(registers.rflags);
        cpu.fpu.image.copy_from_slice(&registers.xsave[..at::END]);
        let mxcsr = cpu.fpu.mxcsr();
        cpu.fpu.set_mxcsr(mxcsr);
        cpu.halted = false;
    }

    /// What user code sees now.
    pub fn user_registers(&self) -> UserRegisters {
        let cpu = &*self.cpu;
        UserRegisters {
            gpr: std::array::from_fn(|i| cpu.gpr[i]),
            rip: cpu.rip,
            rflags: cpu.full_rflags(),
            xsave: cpu.fpu.image,
        }
    }

    /// Features of the instruction set that the guest may use.
    pub fn offered_features(&self) -> &std::collections::HashSet<iced_x86::CpuidFeature> {
        self.native.offered_features()
    }

    /// Page fault address of the last page fault.
    pub fn cr2(&self) -> u64 {
        self.cpu.cr2
    }

    /// Executes the instruction at the instruction pointer.
    pub fn step<I: VcpuIo>(&mut self, io: &I) -> Stepped {
        self.forget_written_code();
        let block = match self.cache.single(&mut self.cpu, &mut self.native) {
            Ok(block) => block,
            Err(stop) => return outcome(&mut self.cpu, stop),
        };
        let cpu = &mut *self.cpu;
        cpu.gpr[BLOCK_RIP as usize] = cpu.rip;
        for op in self.cache.ops(block) {
            let Err(stop) = (op.run)(cpu, op, io) else { continue };
            let (start, next) = (cpu.rip, cpu.next_rip(op));
            match stop {
                Stop::Branch => {}
                Stop::Fault | Stop::Again | Stop::Cannot => cpu.rip = start,
                _ => cpu.rip = next,
            }
            cpu.icount += 1;
            return outcome(cpu, stop);
        }
        Stepped::Done
    }

    fn forget_written_code(&mut self) {
        let events = self.cpu.mailbox.events.swap(0, Ordering::SeqCst);
        if events & mailbox::CODE != 0 {
            for page in self.cpu.mailbox.take_written_code() {
                self.cache.invalidate(&mut self.cpu, page, guest_ram::PAGE_BYTES);
            }
        }
        for (gpa, bytes) in std::mem::take(&mut self.cpu.code_map.hits) {
            self.cache.invalidate(&mut self.cpu, gpa, bytes);
        }
        self.cpu.attention &= !crate::cpu::attention::CODE;
    }
}

fn outcome(cpu: &mut Cpu, stop: Stop) -> Stepped {
    match stop {
        Stop::Branch | Stop::Next | Stop::Again => Stepped::Done,
        Stop::Fault => Stepped::Exception { vector: cpu.fault.vector, error: cpu.fault.error },
        Stop::Trap | Stop::SoftInt => Stepped::Interrupt { vector: cpu.fault.vector },
        Stop::Halt => Stepped::Halted,
        Stop::Cannot => Stepped::Cannot(cpu.internal_error()),
    }
}
