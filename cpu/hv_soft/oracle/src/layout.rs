//! Where code and data are, in the guest and in the traced child alike.

/// The code page.
pub const CODE: u64 = 0x2000_0000;
/// Writable data; the page before it is absent.
pub const DATA: u64 = 0x3000_0000;
/// Bytes of writable data.
pub const DATA_BYTES: usize = 4 * 4096;
/// Bytes of read-only data behind it; the page behind those is absent.
pub const RO_BYTES: usize = 4096;
/// Code, data and read-only data, one behind the other.
pub const SHARED_BYTES: usize = 4096 + DATA_BYTES + RO_BYTES;
/// Base of FS.
pub const FS_BASE: u64 = 0x140;
/// Base of GS: high, so that carries show.
pub const GS_BASE: u64 = 0x7fff_fff0_0000;

/// What kind of code segment the instruction runs in. SDM 3A 3.4.5, 5.2.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 64-bit code.
    Long,
    /// Compatibility mode, 32-bit code, flat segments.
    Bits32,
    /// Compatibility mode, 16-bit code and stack, segments with bases and limits.
    Bits16,
}

/// A segment of user code: what the descriptor says.
#[derive(Clone, Copy, Debug)]
pub struct UserSegment {
    /// Selector. Those with bit 2 set are in the LDT of the traced child.
    pub selector: u16,
    /// First linear address.
    pub base: u64,
    /// Last offset.
    pub limit: u32,
    /// 32-bit default sizes.
    pub big: bool,
    /// Code rather than writable data.
    pub code: bool,
}

const fn selector(index: u16) -> u16 {
    index << 3 | 7
}
/// Linux's selectors of flat user data and 32-bit user code.
const USER_DS: u16 = 0x2b;
const USER32_CS: u16 = 0x23;

impl Mode {
    /// Every mode.
    pub const ALL: [Mode; 3] = [Mode::Long, Mode::Bits32, Mode::Bits16];

    /// Bits of the code segment.
    pub fn bits(self) -> u32 {
        match self {
            Mode::Long => 64,
            Mode::Bits32 => 32,
            Mode::Bits16 => 16,
        }
    }
    /// Registers of a kind that instructions can name.
    pub fn registers(self) -> u64 {
        if self == Mode::Long { 16 } else { 8 }
    }
    /// The instruction pointer at the start of the code page.
    pub fn code(self) -> u64 {
        CODE - self.code_segment().base
    }
    /// What data addresses count from.
    pub fn data_base(self) -> u64 {
        self.data_segment().base
    }
    /// The part of a general register that instructions can see.
    pub fn register_mask(self) -> u64 {
        if self == Mode::Long { u64::MAX } else { u32::MAX as u64 }
    }
    /// CS.
    pub fn code_segment(self) -> UserSegment {
        match self {
            Mode::Bits16 => UserSegment { selector: selector(0), base: CODE, limit: 0xffff, big: false, code: true },
            _ => UserSegment { selector: USER32_CS, base: 0, limit: u32::MAX, big: true, code: true },
        }
    }
    /// DS, ES and SS.
    pub fn data_segment(self) -> UserSegment {
        match self {
            // Its limit lies inside the read-only page, so that it is met before a page fault is.
            Mode::Bits16 => {
                UserSegment { selector: selector(1), base: DATA, limit: DATA_END_16, big: false, code: false }
            }
            _ => UserSegment { selector: USER_DS, base: 0, limit: u32::MAX, big: true, code: false },
        }
    }
    /// FS and GS outside 64-bit code, where their bases come from descriptors.
    pub fn far_segments(self) -> [UserSegment; 2] {
        let far =
            |index, base| UserSegment { selector: selector(index), base, limit: 0xf_ffff, big: true, code: false };
        match self {
            Mode::Bits16 => [far(2, DATA + FS_BASE), far(3, DATA + 0x1000)],
            _ => [far(4, DATA), far(5, DATA + FS_BASE)],
        }
    }
}

const DATA_END_16: u32 = (DATA_BYTES + RO_BYTES) as u32 - 0x81;

/// Segments that live in the LDT.
pub fn local_segments() -> Vec<UserSegment> {
    let mut all = vec![Mode::Bits16.code_segment(), Mode::Bits16.data_segment()];
    all.extend(Mode::Bits16.far_segments());
    all.extend(Mode::Bits32.far_segments());
    all
}
