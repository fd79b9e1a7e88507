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
