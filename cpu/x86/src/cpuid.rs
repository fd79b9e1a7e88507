//! CPUID as a table. SDM 2A "CPUID".

/// One leaf (and sub-leaf) of CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[allow(missing_docs)]
pub struct CpuidLeaf {
    pub leaf: u32,
    /// `None`: the leaf ignores ECX.
    pub subleaf: Option<u32>,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// The leaves a guest sees. What is not in the table reads as zero (within the ranges the maxima announce).
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct CpuidTable(pub Vec<CpuidLeaf>);

impl CpuidTable {
    /// The leaf as stored; `None` if the table has no such leaf.
    pub fn get(&self, leaf: u32, subleaf: u32) -> Option<&CpuidLeaf> {
        self.0.iter().find(|l| l.leaf == leaf && l.subleaf.is_none_or(|s| s == subleaf))
    }
    /// The same, to change it.
    pub fn get_mut(&mut self, leaf: u32, subleaf: u32) -> Option<&mut CpuidLeaf> {
        self.0.iter_mut().find(|l| l.leaf == leaf && l.subleaf.is_none_or(|s| s == subleaf))
    }
    /// Adds a leaf or replaces the one of the same number.
    pub fn set(&mut self, leaf: CpuidLeaf) {
        match self.0.iter_mut().find(|l| l.leaf == leaf.leaf && l.subleaf == leaf.subleaf) {
            Some(old) => *old = leaf,
            None => self.0.push(leaf),
        }
    }
}

/// The feature words of a processor, as CPUID gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Features {
    /// Leaf 1 ECX.
    pub leaf1_ecx: u32,
    /// Leaf 1 EDX.
    pub leaf1_edx: u32,
    /// Leaf 7.0 EBX.
    pub leaf7_ebx: u32,
    /// Leaf 7.0 ECX.
    pub leaf7_ecx: u32,
    /// Leaf 7.0 EDX.
    pub leaf7_edx: u32,
    /// Leaf 8000_0001h ECX.
    pub ext1_ecx: u32,
    /// Leaf 8000_0001h EDX.
    pub ext1_edx: u32,
}

/// ORs `1 << n` for every listed bit.
const fn bits(list: &[u32]) -> u32 {
    let (mut word, mut i) = (0, 0);
    while i < list.len() {
        word |= 1 << list[i];
        i += 1;
    }
    word
}

impl Features {
    /// What the software CPU implements by itself, whatever the host has.
    pub const ALWAYS: Features = Features {
        // CX16, x2APIC, POPCNT by hand; TSC deadline, XSAVE; hypervisor present.
        leaf1_ecx: bits(&[13, 21, 22, 24, 26, 31]),
        // FPU DE PSE TSC MSR PAE CX8 APIC SEP MTRR PGE CMOV PAT PSE36 CLFSH MMX FXSR SSE SSE2
        leaf1_edx: bits(&[0, 2, 3, 4, 5, 6, 8, 9, 11, 12, 13, 15, 16, 17, 19, 23, 24, 25, 26]),
        // FSGSBASE SMEP ERMS SMAP CLFLUSHOPT CLWB
        leaf7_ebx: bits(&[0, 7, 9, 20, 23, 24]),
        // UMIP RDPID
        leaf7_ecx: bits(&[2, 22]),
        // FSRM, IBRS/IBPB, ARCH_CAPABILITIES
        leaf7_edx: bits(&[4, 26, 29]),
        // LAHF in 64-bit mode, PREFETCHW
        ext1_ecx: bits(&[0, 8]),
        // SYSCALL NX 1G pages RDTSCP LM
        ext1_edx: bits(&[11, 20, 26, 27, 29]),
    };

    /// What it passes to the host's own instructions: offered where the host has it.
    pub const NATIVE: Features = Features {
        // SSE3 PCLMUL SSSE3 FMA SSE4.1 SSE4.2 POPCNT AES AVX F16C RDRAND
        leaf1_ecx: bits(&[0, 1, 9, 12, 19, 20, 23, 25, 28, 29, 30]),
        leaf1_edx: 0,
        // BMI1 AVX2 BMI2 RDSEED ADX SHA
        leaf7_ebx: bits(&[3, 5, 8, 18, 19, 29]),
        leaf7_ecx: 0,
        leaf7_edx: 0,
        // LZCNT
        ext1_ecx: bits(&[5]),
        ext1_edx: 0,
    };

    /// The features of the software CPU on a host with `host`'s.
    pub fn soft(host: &Features) -> Features {
        let (a, n) = (&Features::ALWAYS, &Features::NATIVE);
        Features {
            leaf1_ecx: a.leaf1_ecx | n.leaf1_ecx & host.leaf1_ecx,
            leaf1_edx: a.leaf1_edx,
            leaf7_ebx: a.leaf7_ebx | n.leaf7_ebx & host.leaf7_ebx,
            leaf7_ecx: a.leaf7_ecx,
            leaf7_edx: a.leaf7_edx,
            ext1_ecx: a.ext1_ecx | n.ext1_ecx & host.ext1_ecx,
            ext1_edx: a.ext1_edx,
        }
    }
}

/// IA32_ARCH_CAPABILITIES of the software CPU: an interpreter speculates on nothing, so every "not affected" bit is set
/// (RDCL, IBRS_ALL, SKIP_L1DFL, SSB, MDS, PSCHANGE_MC, TAA, SBDR_SSDP, FBSDP, PSDP, BHI, PBRSB, GDS, RFDS, ITS).
pub const ARCH_CAPABILITIES: u64 = 0x0d10_e17b | 1 << 62;

/// Frequency of the guest's TSC under the software CPU: a tick is a nanosecond.
pub const SOFT_TSC_HZ: u32 = 1_000_000_000;

/// The CPUID table of the software CPU: x86-64-v3 where the host allows it, with KVM's paravirtual signature so that
/// stock kernels take their clock from us and calibrate nothing. `physical_bits`: width of guest-physical addresses.
pub fn soft_model(features: &Features, physical_bits: u32) -> CpuidTable {
    let mut table = CpuidTable::default();
    let mut leaf = |leaf: u32, subleaf: Option<u32>, [eax, ebx, ecx, edx]: [u32; 4]| {
        table.set(CpuidLeaf { leaf, subleaf, eax, ebx, ecx, edx });
    };
    let word = |text: &[u8]| u32::from_le_bytes([text[0], text[1], text[2], text[3]]);
    // Family 6, model 143, stepping 8: a model whose quirks kernels do not need to work around.
    let signature = 0x0008_06f8;
    leaf(0, None, [0x16, word(b"Genu"), word(b"ntel"), word(b"ineI")]);
    leaf(1, None, [signature, 0x0001_0800, features.leaf1_ecx, features.leaf1_edx]);
    leaf(2, None, [0x00ff_ff01, 0, 0, 0]);
    // Caches: 32 KiB L1 data and code, 1 MiB L2, 16 MiB L3, 64-byte lines.
    let cache = |kind: u32, level: u32| 1 << 8 | level << 5 | kind;
    let shape = |ways: u32| (ways - 1) << 22 | 63;
    leaf(4, Some(0), [cache(1, 1), shape(8), 63, 0]);
    leaf(4, Some(1), [cache(2, 1), shape(8), 63, 0]);
    leaf(4, Some(2), [cache(3, 2), shape(16), 1023, 0]);
    leaf(4, Some(3), [cache(3, 3), shape(16), 16383, 4]);
    leaf(6, None, [1 << 2, 0, 0, 0]); // the APIC timer does not stop in deep sleep
    leaf(7, Some(0), [0, features.leaf7_ebx, features.leaf7_ecx, features.leaf7_edx]);
    leaf(0xb, Some(0), [0, 1, 1 << 8, 0]);
    leaf(0xb, Some(1), [0, 1, 2 << 8 | 1, 0]);
    let avx = features.leaf1_ecx & 1 << 28 != 0;
    let (components, area) = if avx { (7, 832) } else { (3, 576) };
    leaf(0xd, Some(0), [components, area, area, 0]);
    leaf(0xd, Some(1), [1 | 1 << 2, 0, 0, 0]); // XSAVEOPT, XGETBV with ECX = 1
    if avx {
        leaf(0xd, Some(2), [256, 576, 0, 0]);
    }
    leaf(0x15, None, [1, 1, SOFT_TSC_HZ, 0]);
    leaf(0x16, None, [1000, 1000, 100, 0]);
    leaf(0x4000_0000, None, [0x4000_0010, word(b"KVMK"), word(b"VMKV"), word(b"M\0\0\0")]);
    // Clock source, no I/O delay, clock source 2, the clock is stable.
    leaf(0x4000_0001, None, [bits(&[0, 1, 3, 24]), 0, 0, 0]);
    leaf(0x4000_0010, None, [SOFT_TSC_HZ / 1000, SOFT_TSC_HZ / 1000, 0, 0]);
    leaf(0x8000_0000, None, [0x8000_0008, 0, 0, 0]);
    leaf(0x8000_0001, None, [0, 0, features.ext1_ecx, features.ext1_edx]);
    let brand = b"Vireo virtual CPU\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    for (i, part) in brand[..48].chunks(16).enumerate() {
        leaf(0x8000_0002 + i as u32, None, [word(part), word(&part[4..]), word(&part[8..]), word(&part[12..])]);
    }
    leaf(0x8000_0006, None, [0, 0, 1024 << 16 | 8 << 12 | 64, 0]);
    leaf(0x8000_0007, None, [0, 0, 0, 1 << 8]); // the TSC never stops
    leaf(0x8000_0008, None, [48 << 8 | physical_bits, 0, 0, 0]);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_offers_no_more_than_the_host_has() {
        let bare = Features::soft(&Features::default());
        assert_eq!(bare, Features::ALWAYS);
        let table = soft_model(&bare, 40);
        assert_eq!(table.get(0xd, 0).unwrap().eax, 3, "no AVX state without AVX");
        let all = Features { leaf1_ecx: !0, leaf7_ebx: !0, leaf7_ecx: !0, ext1_ecx: !0, ..Features::default() };
        let rich = soft_model(&Features::soft(&all), 40);
        assert_eq!(rich.get(0xd, 0).unwrap().eax, 7);
        assert_eq!(rich.get(7, 0).unwrap().ecx & 1 << 16, 0, "five-level paging is never offered");
        assert_eq!(rich.get(1, 0).unwrap().ecx & 1 << 27, 0, "OSXSAVE follows CR4, not the model");
    }
}
