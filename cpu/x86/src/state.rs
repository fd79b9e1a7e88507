//! The architectural state of one vCPU.

/// Indices into [`State::gpr`], in the order of the instruction encoding. SDM 2A 2.1.5.
#[allow(missing_docs)]
pub mod gpr {
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
}

/// A segment register with its hidden part. SDM 3A 3.4.3.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, granularity already applied.
    pub limit: u32,
    /// Descriptor bits 55:40: type (3:0), S (4), DPL (6:5), P (7), AVL (12), L (13), D/B (14), G (15).
    /// Bit 16 set: unusable (a null selector was loaded).
    pub attributes: u32,
}

impl Segment {
    /// Attribute bit: the register holds a null selector.
    pub const UNUSABLE: u32 = 1 << 16;
    /// Segment type (bits 3:0 of the attributes).
    pub fn kind(&self) -> u8 {
        (self.attributes & 0xf) as u8
    }
    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        (self.attributes >> 5 & 3) as u8
    }
    /// 64-bit code segment.
    pub fn long(&self) -> bool {
        self.attributes & 1 << 13 != 0
    }
    /// Default operand size (code), stack pointer size (stack).
    pub fn big(&self) -> bool {
        self.attributes & 1 << 14 != 0
    }
    /// Whether it can be used for an access.
    pub fn usable(&self) -> bool {
        self.attributes & Self::UNUSABLE == 0
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Table {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// Everything a vCPU is. Values are architectural; nothing engine-specific.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // register names are their own documentation
pub struct State {
    /// General registers by encoding number ([`gpr`]).
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS: the order of the encoding.
    pub segments: [Segment; 6],
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: Table,
    pub idtr: Table,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub xcr0: u64,
    pub efer: u64,
    /// DR0-DR3, DR6, DR7.
    pub dr: [u64; 6],
    /// XSAVE area in the standard (not compacted) format, 832 bytes for x87, SSE and AVX. SDM 1 13.4.
    pub xsave: Vec<u8>,
    /// Model-specific registers that are not elsewhere here, (number, value), ascending.
    pub msrs: Vec<(u32, u64)>,
    /// TSC value at the moment the state was taken.
    pub tsc: u64,
    /// Local APIC registers, 1 KiB as KVM_GET_LAPIC lays them out.
    pub lapic: Vec<u8>,
    /// IA32_APIC_BASE.
    pub apic_base: u64,
    /// Halted by HLT.
    pub halted: bool,
    /// Interrupts are blocked for one instruction (MOV SS, STI).
    pub interrupt_shadow: bool,
    /// NMIs are blocked until IRET.
    pub nmi_blocked: bool,
    /// An NMI waits to be delivered.
    pub nmi_pending: bool,
}

/// Segment attributes of a writable data segment, accessed, present, 32-bit, limit 4 GiB or 64 KiB.
const RESET_DATA: u32 = 0x93;

impl State {
    /// The state after power-on. SDM 3A 10.1.1 "Processor State After Reset".
    pub fn power_on() -> State {
        let data = Segment { selector: 0, base: 0, limit: 0xffff, attributes: RESET_DATA };
        let code = Segment { selector: 0xf000, base: 0xffff_0000, limit: 0xffff, attributes: 0x9b };
        let system = |kind: u32| Segment { selector: 0, base: 0, limit: 0xffff, attributes: 0x80 | kind };
        let mut gpr = [0; 16];
        gpr[self::gpr::RDX] = 0x600;
        let mut xsave = vec![0; 832];
        xsave[0..2].copy_from_slice(&0x40u16.to_le_bytes());
        xsave[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        State {
            gpr,
            rip: 0xfff0,
            rflags: 2,
            segments: [data, code, data, data, data, data],
            ldtr: system(2),
            tr: system(0xb),
            gdtr: Table { base: 0, limit: 0xffff },
            idtr: Table { base: 0, limit: 0xffff },
            cr0: 0x6000_0010,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            cr8: 0,
            xcr0: 1,
            efer: 0,
            dr: [0, 0, 0, 0, 0xffff_0ff0, 0x400],
            xsave,
            msrs: Vec::new(),
            tsc: 0,
            lapic: Vec::new(),
            apic_base: 0xfee0_0900,
            halted: false,
            interrupt_shadow: false,
            nmi_blocked: false,
            nmi_pending: false,
        }
    }
}
