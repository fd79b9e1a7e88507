//! Loading a Linux kernel without firmware: the PVH entry of an ELF kernel (unpacked on the host where it comes in a
//! bzImage), or the 64-bit boot protocol of a bzImage.

mod bzimage;
mod elf;
mod linux64;
mod payload;
mod pvh;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use guest_ram::{Gpa, GuestRam, RamError};
use x86::{Segment, State};

use crate::layout::Range;

/// Where the command line goes, terminated by a zero byte.
const CMDLINE: u64 = 0x2_0000;
/// Room for the command line in bytes, terminator included.
const CMDLINE_BYTES: usize = 0x1_0000;
/// Kernel images beyond this are not read.
const MAX_FILE_BYTES: u64 = 1 << 30;

/// Which way into the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// PVH where the kernel has it (nothing is left for the guest to unpack), else the 64-bit boot protocol.
    Fastest,
    /// The 64-bit boot protocol, with address space randomisation.
    Linux64,
}

/// What is booted. The files are read anew at every reset.
#[derive(Debug)]
pub struct BootSource {
    /// bzImage, or ELF with a PVH note.
    pub kernel: File,
    /// Initial ram disk.
    pub initrd: Option<File>,
    /// Kernel command line.
    pub cmdline: String,
    /// Which way in.
    pub entry: Entry,
}

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file could not be read.
    #[error("the {what} cannot be read")]
    Read {
        /// kernel, initrd
        what: &'static str,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// A file is larger than any that could be booted.
    #[error("the kernel is larger than {max_bytes} bytes")]
    TooLarge {
        /// Limit.
        max_bytes: u64,
    },
    /// The file is neither a bzImage nor ELF.
    #[error("the kernel is neither a bzImage nor an ELF file: give the kernel image that the distribution boots")]
    UnknownFormat,
    /// ELF, but not for this processor.
    #[error("the kernel is not an ELF file for x86-64")]
    NotElf64,
    /// An ELF kernel without the note.
    #[error("the ELF kernel has no PVH entry: build it with CONFIG_PVH, or give its bzImage")]
    NoPvhEntry,
    /// The file ends too early.
    #[error("the {what} is cut short")]
    Truncated {
        /// Which structure.
        what: &'static str,
    },
    /// Old boot protocol.
    #[error("the kernel speaks boot protocol {major}.{minor}; a 64-bit kernel of version 2.12 or later is needed")]
    Protocol {
        /// Version found.
        major: u8,
        /// Version found.
        minor: u8,
    },
    /// Compression that is not supported.
    #[error(
        "the kernel is packed in a way that is not supported (it begins with {magic:02x?}); gzip, xz, zstd and lz4 are"
    )]
    Compression {
        /// First bytes.
        magic: Vec<u8>,
    },
    /// The compressed stream is damaged.
    #[error("the kernel's {method} payload is damaged")]
    Unpack {
        /// Compression.
        method: &'static str,
        /// Details.
        #[source]
        source: std::io::Error,
    },
    /// Command line too long.
    #[error("the kernel command line has {bytes} bytes; the kernel takes {max_bytes}")]
    CmdlineTooLong {
        /// Length.
        bytes: usize,
        /// Limit.
        max_bytes: usize,
    },
    /// A zero byte in the command line.
    #[error("the kernel command line contains a zero byte")]
    CmdlineZero,
    /// Not enough memory.
    #[error("{what} of {need_bytes} bytes does not fit into the guest's memory: give the domain more memory")]
    NoRoom {
        /// What was to be placed.
        what: &'static str,
        /// Its size.
        need_bytes: u64,
    },
    /// A segment lies outside guest memory.
    #[error("the kernel wants memory that the guest does not have: give the domain more memory")]
    Memory(#[source] RamError),
}

/// What loading needs to know about the machine.
pub(crate) struct Target<'a> {
    pub(crate) ram: &'a GuestRam,
    pub(crate) map: &'a [Range],
    /// End of the memory region that starts at 0.
    pub(crate) low_end: u64,
    /// Where the RSDP is.
    pub(crate) rsdp: u64,
}

impl Target<'_> {
    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), BootError> {
        self.ram.write(Gpa(address), bytes).map_err(BootError::Memory)
    }

    /// Writes zeros; a kernel's memory beyond its file.
    fn clear(&self, address: u64, bytes: u64) -> Result<(), BootError> {
        static ZERO: [u8; 65536] = [0; 65536];
        let mut done = 0;
        while done < bytes {
            let piece = (bytes - done).min(ZERO.len() as u64);
            self.write(address.saturating_add(done), &ZERO[..piece as usize])?;
            done += piece;
        }
        Ok(())
    }

    fn write_cmdline(&self, cmdline: &str, max_bytes: usize) -> Result<(), BootError> {
        let max_bytes = max_bytes.min(CMDLINE_BYTES - 1);
        if cmdline.len() > max_bytes {
            return Err(BootError::CmdlineTooLong { bytes: cmdline.len(), max_bytes });
        }
        if cmdline.contains('\0') {
            return Err(BootError::CmdlineZero);
        }
        self.write(CMDLINE, cmdline.as_bytes())?;
        self.write(CMDLINE + cmdline.len() as u64, &[0])
    }

    /// Puts the initrd as high as it fits below `limit`, above `floor`. Returns address and length.
    fn place_initrd(&self, initrd: &File, floor: u64, limit: u64) -> Result<(u64, u64), BootError> {
        let failed = |source| BootError::Read { what: "initrd", source };
        let mut file = initrd;
        let bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
        file.seek(SeekFrom::Start(0)).map_err(failed)?;
        let no_room = BootError::NoRoom { what: "the initrd", need_bytes: bytes };
        let start = self.low_end.min(limit).checked_sub(bytes).map(|start| start & !0xfff);
        let start = match start {
            Some(start) if start >= floor => start,
            _ => return Err(no_room),
        };
        let mut chunk = vec![0; 1 << 20];
        let mut at = start;
        while at < start + bytes {
            let want = (start + bytes - at).min(chunk.len() as u64) as usize;
            let piece = chunk.get_mut(..want).unwrap_or(&mut []);
            file.read_exact(piece).map_err(failed)?;
            self.write(at, piece)?;
            at += want as u64;
        }
        Ok((start, bytes))
    }
}

impl BootSource {
    /// Loads everything and says in which state the first vCPU starts.
    pub(crate) fn load(&self, target: &Target<'_>) -> Result<State, BootError> {
        let failed = |source| BootError::Read { what: "kernel", source };
        let mut file = &self.kernel;
        file.seek(SeekFrom::Start(0)).map_err(failed)?;
        let mut kernel = Vec::new();
        file.take(MAX_FILE_BYTES + 1).read_to_end(&mut kernel).map_err(failed)?;
        if kernel.len() as u64 > MAX_FILE_BYTES {
            return Err(BootError::TooLarge { max_bytes: MAX_FILE_BYTES });
        }
        if kernel.starts_with(b"\x7fELF") {
            return pvh::load(self, &elf::parse(&kernel)?, target);
        }
        let image = bzimage::parse(&kernel)?;
        if self.entry == Entry::Fastest
            && let Ok(unpacked) = payload::unpack(image.payload)
        {
            // The packed image is not needed any more, and the unpacked one is large.
            let elf = elf::parse(&unpacked)?;
            if elf.pvh_entry.is_some() {
                return pvh::load(self, &elf, target);
            }
        }
        linux64::load(self, &image, target)
    }
}

/// A flat segment of 4 GiB. `kind`: 0xb code, 0x3 data; `long`: 64-bit code.
fn flat(selector: u16, kind: u32, long: bool) -> Segment {
    let size = if long { 1 << 13 } else { 1 << 14 };
    Segment { selector, base: 0, limit: u32::MAX, attributes: 1 << 15 | size | 0x90 | kind }
}

/// What firmware would have left: flat segments, and memory that is cached by default. SDM 3A 12.11.2.1
fn after_firmware() -> State {
    /// MTRRs enabled, default type write-back.
    const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;
    let mut state = State::power_on();
    let data = flat(0x18, 3, false);
    state.segments = [data, flat(0x10, 0xb, false), data, data, data, data];
    state.tr = Segment { selector: 0, base: 0, limit: 0x67, attributes: 0x8b };
    state.gpr = [0; 16];
    state.msrs = vec![(x86::msr::MTRR_DEF_TYPE, MTRR_WRITE_BACK)];
    state
}
