//! Modes and the ways between them.

use iced_x86::code_asm::*;

use crate::suite::Guest;

pub(super) fn guests() -> Vec<Guest> {
    vec![
        Guest::new(
            "real_mode",
            "reset leads to real mode; INT 3, #DE, #UD through the IVT (SDM 3A 20.1)",
            "R[03][00+04][06+02].",
            |image| {
                image.real(|a| {
                    a.say("R")?;
                    a.int3()?;
                    a.catch(|a| {
                        a.xor(cx, cx)?;
                        a.div(cx)
                    })?;
                    a.catch(|a| a.ud2())?;
                    a.say(".")
                })
            },
        ),
        Guest::new("protected_mode", "CR0.PE and a far jump (SDM 3A 9.9.1)", "P[03][06+02][0d 0068+02].", |image| {
            image.protected(|a| {
                a.say("P")?;
                a.int3()?;
                a.catch(|a| a.ud2())?;
                a.mov(ecx, 0x68u32)?;
                a.catch(|a| a.mov(ds, ecx))?;
                a.say(".")
            })
        }),
        Guest::new(
            "long_mode",
            "CR4.PAE, EFER.LME, CR0.PG, far jump (SDM 3A 9.8.5)",
            "L[03][06+02][0e 0000 00400000+02].",
            |image| {
                image.long(|a| {
                    a.say("L")?;
                    a.int3()?;
                    a.catch(|a| a.ud2())?;
                    a.mov(ecx, 0x40_0000u32)?;
                    a.catch(|a| a.mov(al, byte_ptr(rcx)))?;
                    a.say(".")
                })
            },
        ),
    ]
}
