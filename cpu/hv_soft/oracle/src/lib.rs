//! The software CPU held against the processor it runs on: the same instruction on the same registers and memory, results
//! compared bit by bit (registers, flags, vector state, memory, exceptions with their addresses).
//!
//! A traced child process executes instructions natively (`native`), the interpreter executes them at ring 3 of a guest
//! with the same pages (`guest`), `generate` makes up instructions of every form that iced knows, in 64-bit code and in
//! 32-bit and 16-bit code of compatibility mode. Forms
//! that the host lacks, or that a user process cannot compare, are counted by name. A failure prints the seed of its case,
//! which replays it.
//!
//! `unsafe` is confined to `native`.
#![deny(unsafe_code)]

pub mod generate;
pub mod guest;
pub mod layout;
#[allow(unsafe_code)]
pub mod native;
pub mod rng;

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;

use hv_soft::{Stepped, UserRegisters};
use iced_x86::{Code, Instruction, Mnemonic as M, Register, RflagsBits};

use generate::Case;
use guest::Guest;
use layout::{Mode, SHARED_BYTES};
use native::{Native, Processor};
use rng::Rng;

/// What to compare.
#[derive(Clone, Debug)]
pub struct Config {
    /// Decides everything that is random.
    pub seed: u64,
    /// Cases per instruction form.
    pub cases_per_form: u32,
    /// Only forms whose name contains this, in lower case.
    pub only: Option<String>,
    /// Stop after so many failures.
    pub max_failures: usize,
}

/// What came out.
#[derive(Debug, Default)]
pub struct Report {
    /// Cases executed on both sides.
    pub compared: u64,
    /// Forms with at least one case.
    pub forms: usize,
    /// Forms that the guest is not offered because the host lacks them, by name.
    pub lacking: Vec<String>,
    /// Forms that cannot be compared, by name, with the reason.
    pub excluded: Vec<(String, &'static str)>,
    /// Forms for which no encodable case was found.
    pub unbuilt: Vec<String>,
    /// Differences, as text.
    pub failures: Vec<String>,
    /// Forms that the interpreter does not implement, by name.
    pub unimplemented: BTreeMap<String, u64>,
}

/// Bits of RFLAGS that are compared: status, DF, AC.
const COMPARED_FLAGS: u64 = 0x4_0cd5;
/// The most iterations of a repeated instruction.
const MAX_STEPS: u32 = 64;

/// Compares, mode by mode and form by form.
pub fn run(config: &Config) -> Result<Report, Box<dyn Error>> {
    let mut processor = Processor::start()?;
    let mut report = Report::default();
    let mut template = vec![0u8; SHARED_BYTES];
    let mut fill = Rng::new(config.seed);
    template.chunks_mut(8).for_each(|c| c.copy_from_slice(&fill.lane().to_le_bytes()));
    for mode in Mode::ALL {
        if !processor.can(mode) {
            let name = format!("all {}-bit forms", mode.bits());
            report.excluded.push((name, "the host's kernel gives user code no LDT"));
            continue;
        }
        let mut guest = Guest::new(mode)?;
        let offered = guest.offered();
        for code in Code::values().filter(|&c| config.wants(c, mode)) {
            let name = format!("{code:?} in {}-bit code", mode.bits());
            if let Some(reason) = generate::not_comparable(code, mode) {
                report.excluded.push((name, reason));
            } else if !code.cpuid_features().iter().all(|f| offered.contains(f)) {
                report.lacking.push(name);
            } else {
                let bench = Bench { mode, processor: &mut processor, guest: &mut guest, template: &template };
                form(config, bench, code, name, &mut report)?;
            }
            if report.failures.len() >= config.max_failures {
                return Ok(report);
            }
        }
    }
    Ok(report)
}

impl Config {
    fn wants(&self, code: Code, mode: Mode) -> bool {
        let exists = match mode {
            Mode::Long => code.op_code().mode64(),
            Mode::Bits32 => code.op_code().mode32(),
            Mode::Bits16 => code.op_code().mode16(),
        };
        exists && self.only.as_ref().is_none_or(|o| format!("{code:?}").to_lowercase().contains(o.as_str()))
    }
}

/// All cases of one form.
fn form(
    config: &Config,
    mut bench: Bench<'_>,
    code: Code,
    name: String,
    report: &mut Report,
) -> Result<(), Box<dyn Error>> {
    let mut done = 0;
    for attempt in 0..config.cases_per_form {
        let mut rng = Rng::new(case_seed(config.seed, code, bench.mode, attempt));
        let Some(case) = generate::case(code, bench.mode, &mut rng) else { continue };
        match bench.compare(&case, &mut rng)? {
            Verdict::Same => done += 1,
            Verdict::Unimplemented => *report.unimplemented.entry(name.clone()).or_default() += 1,
            Verdict::Different(text) => {
                report.failures.push(format!("seed {} form {name} attempt {attempt}\n{text}", config.seed));
                done += 1;
                // One of a kind is enough to look at.
                break;
            }
        }
    }
    if done == 0 && !report.unimplemented.contains_key(&name) {
        report.unbuilt.push(name);
    } else {
        report.forms += 1;
    }
    report.compared += done;
    Ok(())
}

fn case_seed(seed: u64, code: Code, mode: Mode, attempt: u32) -> u64 {
    let mut mix = Rng::new(Rng::new(seed).bits() ^ (mode.bits() as u64) << 48 ^ (code as u64) << 32 ^ attempt as u64);
    mix.bits()
}

enum Verdict {
    Same,
    Unimplemented,
    Different(String),
}

struct Bench<'a> {
    mode: Mode,
    processor: &'a mut Processor,
    guest: &'a mut Guest,
    template: &'a [u8],
}

impl Bench<'_> {
    fn compare(&mut self, case: &Case, rng: &mut Rng) -> Result<Verdict, Box<dyn Error>> {
        let before = registers(self.mode, case, rng);
        let mut memory = self.template.to_vec();
        memory[..16].fill(0x90);
        memory[..case.bytes.len()].copy_from_slice(&case.bytes);
        self.processor.memory().copy_from_slice(&memory);
        self.guest.set_memory(&memory);
        let mut theirs = before.clone();
        let mut native = self.processor.step(self.mode, &mut theirs)?;
        // A stepped gather may trap before its last element.
        let gathers = case.instruction.is_vsib();
        let repeats = case.instruction.has_rep_prefix() || case.instruction.has_repne_prefix() || gathers;
        let mut steps = 1;
        while repeats && native == Native::Done && theirs.rip == before.rip && steps < MAX_STEPS {
            native = self.processor.step(self.mode, &mut theirs)?;
            steps += 1;
        }
        let mut ours = before.clone();
        let (mut stepped, mut cr2) = self.guest.step(&mut ours);
        while stepped == Stepped::Done && ours.rip == before.rip && repeats && steps < 2 * MAX_STEPS {
            (stepped, cr2) = self.guest.step(&mut ours);
            steps += 1;
        }
        if matches!(stepped, Stepped::Cannot(_)) {
            return Ok(Verdict::Unimplemented);
        }
        let mut after = vec![0u8; SHARED_BYTES];
        self.guest.memory(&mut after);
        let their_memory = self.processor.memory();
        if native == Native::Done && matches!(case.instruction.mnemonic(), M::Pushf | M::Pushfd | M::Pushfq) {
            hide_trap_flag(their_memory, self.mode, theirs.gpr[4]);
        }
        let mut difference = String::new();
        let segment = case.instruction.segment_prefix();
        let upper_half = matches!(segment, Register::FS | Register::GS) && cr2 >> 47 != 0;
        // For a masked store of bytes, processors check the whole operand and name its first byte, chosen or not.
        let whole_operand = stores_bytes(&case.instruction)
            && match native {
                Native::Exception { vector: 13 | 14, .. } if stepped == Stepped::Done => true,
                Native::Exception { page: Some((at, _)), .. } => at.abs_diff(cr2) < 16,
                _ => false,
            };
        // AMD's misaligned mode, bit 17 of MXCSR, is not offered to guests.
        let misaligned_mode = native == Native::Done
            && matches!(case.instruction.mnemonic(), M::Ldmxcsr | M::Vldmxcsr)
            && theirs.xsave[26] & 2 != 0;
        if whole_operand || misaligned_mode {
            return Ok(Verdict::Same);
        }
        if self.mode != Mode::Long && either_limit(&case.instruction, self.mode, native, &stepped) {
            return Ok(Verdict::Same);
        }
        outcomes(&mut difference, native, &stepped, cr2, upper_half);
        // Intel's SHA instructions want their operand aligned, AMD's do not.
        let misaligned_sha = format!("{:?}", case.instruction.mnemonic()).starts_with("Sha")
            && matches!(stepped, Stepped::Exception { vector: 13, .. });
        if misaligned_sha {
            return Ok(Verdict::Same);
        }
        // Where a conversion into an MMX register faults, the x87 unit may have changed over to MMX already.
        let mmx_fault =
            native != Native::Done && (0..case.instruction.op_count()).any(|n| case.instruction.op_register(n).is_mm());
        if gathers && native != Native::Done {
            // Processors may have widened the mask's sign bits to whole elements, or not yet.
            let mask = case.instruction.op_register(2).number();
            let element = case.instruction.memory_size().element_size();
            [&mut theirs, &mut ours].into_iter().for_each(|r| signs_of_mask(&mut r.xsave, mask, element));
        }
        compare_registers(&mut difference, self.mode, &case.instruction, &theirs, &ours, mmx_fault);
        if let Some(at) = (0..SHARED_BYTES).find(|&i| their_memory[i] != after[i]) {
            let show = |m: &[u8]| format!("{:02x?}", &m[at & !7..(at & !7) + 16]);
            let _ = writeln!(
                difference,
                "  memory at offset {at:#x}: processor {} interpreter {}",
                show(their_memory),
                show(&after)
            );
        }
        if difference.is_empty() {
            return Ok(Verdict::Same);
        }
        Ok(Verdict::Different(format!(
            "  {} bytes {:02x?}\n  gpr {:x?} rflags {:#x} mxcsr {:02x?} x87 {:02x?}\n{difference}",
            case.instruction,
            case.bytes,
            before.gpr,
            before.rflags,
            &before.xsave[24..28],
            &before.xsave[..6],
        )))
    }
}

/// PUSHF stores the trap flag by which the child is stepped.
fn hide_trap_flag(memory: &mut [u8], mode: Mode, rsp: u64) {
    let rsp = if mode == Mode::Bits16 { rsp & 0xffff } else { rsp };
    let offset = (rsp + mode.data_base()).wrapping_sub(layout::DATA).wrapping_add(4096 + 1) as usize;
    if let Some(byte) = memory.get_mut(offset) {
        *byte &= !1;
    }
}

fn stores_bytes(i: &Instruction) -> bool {
    matches!(i.mnemonic(), M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu)
}

/// Several faults at once outside 64-bit code: which comes first, #GP or #SS, differs between processors. It is so where a
/// flat segment ends at 4 GiB, for operands that are misaligned too, and for calls whose target is bad as well.
fn either_limit(i: &Instruction, mode: Mode, native: Native, stepped: &Stepped) -> bool {
    let vector = (0..i.op_count()).any(|n| i.op_register(n).is_vector_register() || i.op_register(n).is_mm());
    let ambiguous = mode == Mode::Bits32 || vector || matches!(i.mnemonic(), M::Call);
    let limit = |v: u8| matches!(v, 12 | 13);
    match (native, stepped) {
        (Native::Exception { vector: theirs, .. }, Stepped::Exception { vector: ours, .. }) => {
            ambiguous && limit(theirs) && limit(*ours) || i.mnemonic() == M::Call && theirs == 14 && limit(*ours)
        }
        _ => false,
    }
}

/// Reduces the elements of vector register `n` to their sign bits.
fn signs_of_mask(xsave: &mut [u8; 832], n: usize, element: usize) {
    for at in [160 + 16 * n, 576 + 16 * n] {
        for (i, byte) in xsave[at..at + 16].iter_mut().enumerate() {
            *byte &= if i % element == element - 1 { 0x80 } else { 0 };
        }
    }
}

/// Register contents for a case.
fn registers(mode: Mode, case: &Case, rng: &mut Rng) -> UserRegisters {
    let mut xsave = [0u8; 832];
    let mut put = |at: usize, bytes: &[u8]| xsave[at..at + bytes.len()].copy_from_slice(bytes);
    let control: u16 = if rng.one_in(3) { 0x37f & !0xf00 | (rng.bits() as u16 & 0xf00) } else { 0x37f };
    let control = if rng.one_in(8) { control & !(rng.bits() as u16 & 0x3f) } else { control };
    put(0, &control.to_le_bytes());
    let status = (rng.bits() as u16 & 0x7800) | (rng.bits() as u16 & 0x4700);
    put(2, &status.to_le_bytes());
    put(4, &[rng.bits() as u8]);
    let rounding = (rng.bits() as u32 & 3) << 13;
    let mxcsr = 0x1f80 | rounding | if rng.one_in(4) { rng.bits() as u32 & 0x8040 } else { 0 };
    let mxcsr = if rng.one_in(8) { mxcsr & !(rng.bits() as u32 & 0x1f80) } else { mxcsr };
    put(24, &mxcsr.to_le_bytes());
    for st in 0..8 {
        put(32 + 16 * st, &rng.lane().to_le_bytes());
        let exponent = rng.pick(&[0u16, 1, 0x3fff, 0x3ffe, 0x4005, 0xbfff, 0x7fff, 0xffff, 0x7ffe]);
        put(40 + 16 * st, &exponent.to_le_bytes());
    }
    for lane in (160..416).chain(576..832).step_by(1).filter(|o| o % 8 == 0) {
        put(lane, &rng.lane().to_le_bytes());
    }
    put(512, &[7]);
    let direction = if rng.one_in(4) { 0x400 } else { 0 };
    let rflags = rng.bits() & 0x8d5 | direction | 0x202;
    UserRegisters { gpr: case.gpr, rip: mode.code(), rflags, xsave }
}

/// `upper_half`: an access through FS or GS to the upper half, which AMD's processors refuse with #GP.
fn outcomes(difference: &mut String, native: Native, stepped: &Stepped, cr2: u64, upper_half: bool) {
    let same = match (native, stepped) {
        (Native::Exception { vector: 13, .. }, Stepped::Exception { vector: 14, .. }) if upper_half => true,
        (Native::Done, Stepped::Done) => true,
        // #BR and #GP reach a user process as the same signal.
        (Native::Exception { vector: 13, .. }, Stepped::Exception { vector: 5, .. }) => true,
        // Ten bytes across the edge of the canonical range: read in two parts, either may fault first.
        (Native::Exception { page: Some((address, _)), .. }, Stepped::Exception { vector: 12 | 13, .. })
            if (0x7fff_ffff_fff0..1 << 47).contains(&address) || (0xffff_fff0..1 << 32).contains(&address) =>
        {
            true
        }
        (Native::Exception { vector: 16, .. }, Stepped::Exception { vector: 16 | 19, .. }) => true,
        (
            Native::Exception { vector: 14, page: Some((address, present)) },
            Stepped::Exception { vector: 14, error },
        ) => address == cr2 && error.is_some_and(|e| (e & 1 != 0) == present),
        (Native::Exception { vector: theirs, .. }, Stepped::Exception { vector: ours, .. }) => theirs == *ours,
        _ => false,
    };
    if !same {
        let _ = writeln!(difference, "  processor {native:x?}, interpreter {stepped:x?} cr2 {cr2:#x}");
    }
}

/// Flags that the SDM leaves undefined and that this processor sets otherwise than the interpreter.
fn undefined_flags(i: &Instruction) -> u64 {
    // Shifts and rotates run natively: even their undefined flags agree, and are compared.
    let native = matches!(i.mnemonic(), M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr);
    if native {
        return 0;
    }
    let undefined = i.rflags_undefined();
    [
        (RflagsBits::CF, 1),
        (RflagsBits::PF, 4),
        (RflagsBits::AF, 0x10),
        (RflagsBits::ZF, 0x40),
        (RflagsBits::SF, 0x80),
        (RflagsBits::OF, 0x800),
    ]
    .into_iter()
    .filter(|(bit, _)| undefined & bit != 0)
    .fold(0, |mask, (_, flag)| mask | flag)
}

fn compare_registers(
    difference: &mut String,
    mode: Mode,
    i: &Instruction,
    theirs: &UserRegisters,
    ours: &UserRegisters,
    mmx_fault: bool,
) {
    // POPA that faults half way: processors differ in what they have loaded by then.
    let partial = matches!(i.mnemonic(), M::Popa | M::Popad) && theirs.rip == mode.code();
    for n in (0..mode.registers() as usize).filter(|_| !partial) {
        if (theirs.gpr[n] ^ ours.gpr[n]) & mode.register_mask() != 0 {
            let _ = writeln!(difference, "  gpr {n}: processor {:#x}, interpreter {:#x}", theirs.gpr[n], ours.gpr[n]);
        }
    }
    if theirs.rip != ours.rip {
        let _ = writeln!(difference, "  rip: processor {:#x}, interpreter {:#x}", theirs.rip, ours.rip);
    }
    let mask = COMPARED_FLAGS & !undefined_flags(i);
    if (theirs.rflags ^ ours.rflags) & mask != 0 {
        let (t, o) = (theirs.rflags & mask, ours.rflags & mask);
        let _ = writeln!(difference, "  rflags: processor {t:#x}, interpreter {o:#x}");
    }
    let areas = [("x87 control", 0, 5), ("mxcsr", 24, 28), ("st", 32, 160), ("xmm", 160, 416), ("ymm high", 576, 832)];
    let (mut theirs, mut ours) = (theirs.clone(), ours.clone());
    // An unmasked overflow or underflow: whether the result is inexact too is judged on a result that is not delivered.
    // A dot product has stages, and which of them ran before an unmasked exception is not told.
    let unmasked = u16::from_le_bytes([ours.xsave[24], ours.xsave[25]]) >> 7;
    let flags = ours.xsave[24] & 0x3f & !(unmasked as u8);
    let untold = if flags != 0 && matches!(i.mnemonic(), M::Dpps | M::Dppd | M::Vdpps | M::Vdppd) {
        0x3f
    } else if flags & 0x18 != 0 {
        0x20
    } else {
        0
    };
    theirs.xsave[24] |= untold;
    ours.xsave[24] |= untold;
    for (what, from, to) in areas.into_iter().filter(|a| !(mmx_fault && matches!(a.0, "x87 control" | "st"))) {
        if let Some(at) = (from..to).find(|&at| theirs.xsave[at] != ours.xsave[at]) {
            let base = at & !15;
            let _ = writeln!(
                difference,
                "  {what} at {at}: processor {:02x?}, interpreter {:02x?}",
                &theirs.xsave[base..base + 16],
                &ours.xsave[base..base + 16]
            );
        }
    }
}
