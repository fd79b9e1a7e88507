//! What a guest is, and whether a run of it was right.

use std::fmt;

use crate::image::{BuildError, Image};

/// A feature without which a guest is skipped: a bit of a CPUID leaf.
#[derive(Clone, Copy, Debug)]
pub struct Need {
    /// Name to print.
    pub name: &'static str,
    /// Leaf.
    pub leaf: u32,
    /// Register: 0 EAX to 3 EDX.
    pub word: usize,
    /// Bit number.
    pub bit: u32,
}

/// How a guest ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It wrote to the stop port.
    Stop,
    /// It shut down by a triple fault.
    TripleFault,
    /// The watchdog stopped it.
    TimedOut,
    /// The engine gave up.
    Failed(String),
}

/// What a run gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Everything printed.
    pub output: String,
    /// How it ended.
    pub end: End,
}

/// How a peer relates to what the manual says.
#[derive(Clone, Copy, Debug)]
pub enum Peer {
    /// It does the same.
    Same,
    /// It prints something else, for a reason.
    Differs {
        /// What it prints.
        output: &'static str,
        /// Why that is no fault of ours.
        why: &'static str,
    },
    /// The guest cannot run there.
    Skipped(&'static str),
}

/// Who runs guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ran {
    /// The software CPU.
    Soft,
    /// KVM.
    Kvm,
    /// QEMU's TCG.
    Qemu,
}

/// One tiny guest.
pub struct Guest {
    /// Its name.
    pub name: &'static str,
    /// What it proves, with the section of the manual.
    pub proves: &'static str,
    /// What it prints.
    pub output: &'static str,
    /// How it ends.
    pub end: End,
    /// Features it needs.
    pub needs: &'static [Need],
    /// How QEMU differs.
    pub qemu: Peer,
    /// How KVM differs.
    pub kvm: Peer,
    build: fn(&mut Image) -> Result<(), BuildError>,
}

impl Guest {
    pub(crate) fn new(
        name: &'static str,
        proves: &'static str,
        output: &'static str,
        build: fn(&mut Image) -> Result<(), BuildError>,
    ) -> Guest {
        Guest { name, proves, output, end: End::Stop, needs: &[], qemu: Peer::Same, kvm: Peer::Same, build }
    }
    pub(crate) fn needs(self, needs: &'static [Need]) -> Guest {
        Guest { needs, ..self }
    }
    pub(crate) fn on_qemu(self, qemu: Peer) -> Guest {
        Guest { qemu, ..self }
    }
    pub(crate) fn on_kvm(self, kvm: Peer) -> Guest {
        Guest { kvm, ..self }
    }
    pub(crate) fn ends(self, end: End) -> Guest {
        Guest { end, ..self }
    }

    /// The bytes of its image.
    pub fn image(&self) -> Result<Vec<u8>, BuildError> {
        let mut image = Image::new()?;
        (self.build)(&mut image)?;
        Ok(image.finish())
    }

    /// How `ran` relates to the manual.
    pub fn peer(&self, ran: Ran) -> Peer {
        match ran {
            Ran::Soft => Peer::Same,
            Ran::Kvm => self.kvm,
            Ran::Qemu => self.qemu,
        }
    }
}

/// The result of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As expected.
    Passed,
    /// As expected of this peer, which differs for the reason given.
    Differs(&'static str),
    /// Not run, for the reason given.
    Skipped(String),
    /// Wrong.
    Failed {
        /// What should have been.
        expected: Outcome,
        /// What was.
        got: Outcome,
    },
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Passed => write!(f, "ok"),
            Verdict::Differs(why) => write!(f, "ok, differs: {why}"),
            Verdict::Skipped(why) => write!(f, "skipped: {why}"),
            Verdict::Failed { expected, got } => write!(
                f,
                "FAILED\n  expected {:?}, then {:?}\n  got      {:?}, then {:?}",
                expected.output, expected.end, got.output, got.end
            ),
        }
    }
}

/// Compares a run with what was expected of it.
pub fn judge(guest: &Guest, ran: Ran, got: Outcome) -> Verdict {
    let expected = Outcome { output: guest.output.to_owned(), end: guest.end.clone() };
    if got == expected {
        return Verdict::Passed;
    }
    match guest.peer(ran) {
        Peer::Differs { output, why } if got.end == guest.end && got.output == output => Verdict::Differs(why),
        Peer::Skipped(why) => Verdict::Skipped(why.to_owned()),
        _ => Verdict::Failed { expected, got },
    }
}
