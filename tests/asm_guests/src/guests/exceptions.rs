//! Exceptions and how they escalate.

use iced_x86::code_asm::*;

use crate::image::{BuildError, Image, gate};
use crate::layout::*;
use crate::suite::{End, Guest};

pub(super) fn guests() -> Vec<Guest> {
    vec![
        Guest::new(
            "divide_error",
            "#DE by zero and by overflow, operands unchanged (SDM 3A 6.15)",
            "[00+02][00+02][00+02]80000000 .",
            divide_error,
        ),
        Guest::new(
            "triple_fault",
            "an exception with no IDT, and none for its faults: shutdown (SDM 3A 6.15)",
            "T",
            triple_fault,
        )
        .ends(End::TripleFault),
    ]
}

fn divide_error(image: &mut Image) -> Result<(), BuildError> {
    image.long(|a| {
        a.xor(ecx, ecx)?;
        a.mov(eax, 0x8000_0000u32)?;
        a.catch(|a| a.div(ecx))?;
        a.mov(eax, 0x8000_0000u32)?;
        a.cdq()?;
        a.mov(ecx, -1)?;
        a.catch(|a| a.idiv(ecx))?;
        a.mov(ax, 0x100)?;
        a.mov(cl, 1)?;
        a.catch(|a| a.div(cl))?;
        a.mov(eax, 0x8000_0000u32)?;
        a.mov(ecx, eax)?;
        a.show(ecx)?;
        a.say(".")
    })
}

fn triple_fault(image: &mut Image) -> Result<(), BuildError> {
    let _ = gate;
    image.protected(|a| {
        a.say("T")?;
        a.lidt(fword_ptr(SCRATCH))?;
        a.int3()
    })
}
