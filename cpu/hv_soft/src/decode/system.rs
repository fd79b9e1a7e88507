//! Instructions of the system, and vector instructions that reach memory element by element.

use iced_x86::{Code, Mnemonic as M, OpKind};

use super::One;
use crate::cpu::{ES, FS, GS, Handler, SS, ZERO, addr};
use crate::ops::{masked, system, transfer};

impl One<'_> {
    pub(super) fn system(&mut self) -> bool {
        match self.i.mnemonic() {
            M::Nop
            | M::Pause
            | M::Endbr64
            | M::Endbr32
            | M::Prefetchnta
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Prefetchw
            | M::Prefetch
            | M::Prefetchwt1
            | M::Reservednop
            | M::Mfence
            | M::Lfence
            | M::Sfence => self.run(system::nop),
            M::Clflush | M::Clflushopt | M::Clwb => {
                self.memory();
                self.run(system::touch);
            }
            M::Hlt => self.ending(system::hlt),
            M::Cli => self.run(system::cli),
            M::Sti => self.ending(system::sti),
            M::Clac => self.run(system::access_flag::<false>),
            M::Stac => self.run(system::access_flag::<true>),
            M::In | M::Out => self.port(),
            M::Cpuid => self.run(system::cpuid),
            M::Rdtsc => self.run(system::rdtsc::<false>),
            M::Rdtscp => self.run(system::rdtsc::<true>),
            M::Rdpid => {
                self.op.dst = self.reg(0);
                self.run(system::rdpid);
            }
            M::Rdmsr => self.run(system::rdmsr),
            M::Wrmsr => self.ending(system::wrmsr),
            M::Rdpmc => self.run(system::rdpmc),
            M::Xgetbv => self.run(system::xgetbv),
            M::Xsetbv => self.ending(system::xsetbv),
            M::Swapgs => self.run(system::swapgs),
            M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase => self.segment_base(),
            M::Rdrand | M::Rdseed => {
                self.op.dst = self.reg(0);
                let width = self.width(0);
                self.run(by_word!(width, T => system::random::<T>));
                return self.native.offered(self.i);
            }
            M::Clts => self.ending(system::clts),
            M::Invd | M::Wbinvd | M::Wbnoinvd => self.run(system::wbinvd),
            M::Invlpg => {
                self.memory();
                self.ending(system::invlpg);
            }
            M::Syscall => self.ending(transfer::syscall),
            M::Sysret => self.ending(transfer::sysret::<false>),
            M::Sysretq => self.ending(transfer::sysret::<true>),
            M::Sysenter => self.ending(transfer::sysenter),
            M::Sysexit => self.ending(transfer::sysexit::<false>),
            M::Sysexitq => self.ending(transfer::sysexit::<true>),
            M::Ud0 | M::Ud1 | M::Ud2 => self.ending(system::ud),
            _ => return self.tables() || self.state(),
        }
        true
    }

    fn port(&mut self) {
        let out = self.i.mnemonic() == M::Out;
        let (port, data) = if out { (0, 1) } else { (1, 0) };
        let width = self.width(data);
        if self.is_reg(port) {
            self.op.extra = 1;
        } else {
            self.op.imm = self.immediate(port);
        }
        self.ends = true;
        self.run(if out {
            by_width!(width, T => system::port_out::<T>)
        } else {
            by_width!(width, T => system::port_in::<T>)
        });
    }

    fn segment_base(&mut self) {
        let mnemonic = self.i.mnemonic();
        let write = matches!(mnemonic, M::Wrfsbase | M::Wrgsbase);
        self.op.extra = if matches!(mnemonic, M::Rdfsbase | M::Wrfsbase) { FS } else { GS } as u8;
        (self.op.dst, self.op.src) = (self.reg(0), self.reg(0));
        let width = self.width(0);
        self.run(if write {
            by_word!(width, T => system::write_base::<T>)
        } else {
            by_word!(width, T => system::read_base::<T>)
        });
    }

    fn tables(&mut self) -> bool {
        match self.i.mnemonic() {
            M::Lgdt | M::Lidt | M::Sgdt | M::Sidt => {
                self.memory();
                let wide = !matches!(
                    self.i.code(),
                    Code::Lgdt_m1632_16 | Code::Lidt_m1632_16 | Code::Sgdt_m1632_16 | Code::Sidt_m1632_16
                );
                if wide {
                    self.op.kind |= addr::OPERAND32;
                }
                match self.i.mnemonic() {
                    M::Lgdt => self.run(system::load_table::<false>),
                    M::Lidt => self.run(system::load_table::<true>),
                    M::Sgdt => self.run(system::store_table::<false>),
                    _ => self.run(system::store_table::<true>),
                }
            }
            M::Lldt | M::Ltr | M::Lmsw => {
                let (mem, _) = self.source(0);
                self.ending(match (self.i.mnemonic(), mem) {
                    (M::Lldt, true) => system::lldt::<true>,
                    (M::Lldt, false) => system::lldt::<false>,
                    (M::Ltr, true) => system::ltr::<true>,
                    (M::Ltr, false) => system::ltr::<false>,
                    (_, true) => system::lmsw::<true>,
                    (_, false) => system::lmsw::<false>,
                });
            }
            M::Sldt | M::Str | M::Smsw => {
                let (mem, width) = self.destination();
                self.run(match (self.i.mnemonic(), mem) {
                    (M::Sldt, true) => system::store_selector_mem::<false>,
                    (M::Str, true) => system::store_selector_mem::<true>,
                    (M::Sldt, false) => by_word!(width, T => system::store_selector::<false, T>),
                    (M::Str, false) => by_word!(width, T => system::store_selector::<true, T>),
                    (_, true) => system::smsw_mem,
                    (_, false) => by_word!(width, T => system::smsw::<T>),
                });
            }
            M::Lar | M::Lsl => {
                self.op.dst = self.reg(0);
                let width = self.width(0);
                let lar = self.i.mnemonic() == M::Lar;
                let (mem, _) = self.source(1);
                self.run(match (lar, mem) {
                    (true, true) => by_word!(width, T => system::inspect::<{ system::LAR }, true, T>),
                    (true, false) => by_word!(width, T => system::inspect::<{ system::LAR }, false, T>),
                    (false, true) => by_word!(width, T => system::inspect::<{ system::LSL }, true, T>),
                    (false, false) => by_word!(width, T => system::inspect::<{ system::LSL }, false, T>),
                });
            }
            M::Verr | M::Verw => {
                let (mem, _) = self.source(0);
                self.run(match (self.i.mnemonic(), mem) {
                    (M::Verr, true) => system::inspect::<{ system::VERR }, true, u16>,
                    (M::Verr, false) => system::inspect::<{ system::VERR }, false, u16>,
                    (_, true) => system::inspect::<{ system::VERW }, true, u16>,
                    (_, false) => system::inspect::<{ system::VERW }, false, u16>,
                });
            }
            M::Arpl => {
                let (mem, _) = self.destination();
                self.op.src = self.reg(1);
                self.run(if mem { system::arpl::<true> } else { system::arpl::<false> });
            }
            M::Lds | M::Les | M::Lss | M::Lfs | M::Lgs => {
                self.memory();
                self.op.dst = self.reg(0);
                self.op.extra = match self.i.mnemonic() {
                    M::Lds => crate::cpu::DS,
                    M::Les => ES,
                    M::Lss => SS,
                    M::Lfs => FS,
                    _ => GS,
                } as u8;
                self.ends = true;
                let width = self.width(0);
                self.run(by_word!(width, T => transfer::load_far_pointer::<T>));
            }
            _ => return false,
        }
        true
    }

    /// Vector instructions that reach memory element by element.
    pub(super) fn masked_vectors(&mut self) -> bool {
        use masked::{Shape, gather, masked_load, masked_store, maskmovdqu, maskmovq};
        let mut shape = Shape { element: 4, count: 0, index: 0, scale: 0, index_register: 0 };
        let vector = |one: &Self, n| one.i.op_register(n).number() as u8;
        match self.i.mnemonic() {
            M::Vmaskmovps | M::Vpmaskmovd | M::Vmaskmovpd | M::Vpmaskmovq => {
                if matches!(self.i.mnemonic(), M::Vmaskmovpd | M::Vpmaskmovq) {
                    shape.element = 8;
                }
                let store = self.is_mem(0);
                let width = self.i.op_register(1).size() as u8;
                shape.count = width / shape.element;
                (self.op.dst, self.op.src) =
                    if store { (vector(self, 2), vector(self, 1)) } else { (vector(self, 0), vector(self, 1)) };
                self.memory();
                self.run(if store { masked_store } else { masked_load });
            }
            M::Vgatherdps
            | M::Vgatherdpd
            | M::Vgatherqps
            | M::Vgatherqpd
            | M::Vpgatherdd
            | M::Vpgatherdq
            | M::Vpgatherqd
            | M::Vpgatherqq => {
                let wide = matches!(self.i.mnemonic(), M::Vgatherdpd | M::Vgatherqpd | M::Vpgatherdq | M::Vpgatherqq);
                let narrow_index =
                    matches!(self.i.mnemonic(), M::Vgatherdps | M::Vgatherdpd | M::Vpgatherdd | M::Vpgatherdq);
                shape.element = if wide { 8 } else { 4 };
                shape.index = if narrow_index { 4 } else { 8 };
                let (data, index) = (self.i.op_register(0).size() as u8, self.i.memory_index().size() as u8);
                shape.count = (data / shape.element).min(index / shape.index);
                shape.index_register = self.i.memory_index().number() as u8;
                shape.scale = self.i.memory_index_scale().trailing_zeros() as u8;
                (self.op.dst, self.op.src) = (vector(self, 0), vector(self, 2));
                self.memory();
                (self.op.index, self.op.scale) = (ZERO, 0);
                self.run(gather);
            }
            M::Maskmovdqu | M::Vmaskmovdqu | M::Maskmovq => {
                let bits = match self.i.op_kind(0) {
                    OpKind::MemorySegRDI => 64,
                    OpKind::MemorySegEDI => 32,
                    _ => 16,
                };
                self.addressing(bits, self.i.memory_segment());
                self.op.base = crate::cpu::RDI as u8;
                (self.op.dst, self.op.src) = (vector(self, 1), vector(self, 2));
                self.run(match self.i.mnemonic() {
                    M::Maskmovdqu => maskmovdqu::<false>,
                    M::Vmaskmovdqu => maskmovdqu::<true>,
                    _ => maskmovq,
                });
            }
            _ => return false,
        }
        self.op.imm = shape.pack();
        if !self.native.offered(self.i) {
            self.run(system::ud);
        }
        true
    }

    fn state(&mut self) -> bool {
        use system::{FXRSTOR, FXSAVE, LDMXCSR, STMXCSR, XRSTOR, XSAVE, vector_state};
        let handler: Handler = match self.i.mnemonic() {
            M::Fxsave => vector_state::<FXSAVE>,
            M::Fxsave64 => {
                self.op.kind |= addr::OPERAND64;
                vector_state::<FXSAVE>
            }
            M::Fxrstor | M::Fxrstor64 => vector_state::<FXRSTOR>,
            M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 => vector_state::<XSAVE>,
            M::Xrstor | M::Xrstor64 => vector_state::<XRSTOR>,
            M::Ldmxcsr | M::Vldmxcsr => vector_state::<LDMXCSR>,
            M::Stmxcsr | M::Vstmxcsr => vector_state::<STMXCSR>,
            M::Wait => {
                self.run(system::fwait);
                return true;
            }
            _ => return false,
        };
        self.memory();
        self.run(handler);
        true
    }
}
