//! A deflate compressor (RFC 1951) for clusters and grains: the whole input is at hand, the window may be small,
//! and most inputs are either text and code or do not shrink at all. Those that do not are found out early.
//!
//! `matches` finds repeated strings, `huffman` makes code lengths, this file cuts the tokens into blocks and writes
//! each in the cheapest of the three ways the format knows.

mod bits;
mod huffman;
mod matches;

use bits::BitWriter;
use huffman::{Code, lengths};
use matches::{Finder, Token};

/// Tokens of one block. Codes follow the data more closely when blocks are short, and cost their lengths each time.
const BLOCK_TOKENS: usize = 1 << 14;
const END_OF_BLOCK: usize = 256;
/// The last two never occur; the fixed code counts them.
const LITERALS: usize = 288;
const DISTANCES: usize = 30;
/// Longest code of literals and distances, RFC 1951 section 3.2.7.
const CODE_BITS_MAX: u32 = 15;
/// Longest code of code lengths.
const LENGTH_BITS_MAX: u32 = 7;
/// The order in which lengths of the code length code are stored.
const LENGTH_ORDER: [usize; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];

/// First length of each length code from 257 on, and its extra bits. Section 3.2.5.
const LENGTH_BASE: [u16; 29] =
    [3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258];
const LENGTH_EXTRA: [u8; 29] = [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0];

/// The code of a match length, from 0: the literal alphabet continues at 257 with it.
const fn length_codes() -> [u8; 256] {
    let mut codes = [0; 256];
    let mut code = 0;
    let mut length = 3;
    while length <= 258 {
        // 258 has a code of its own, the last.
        while code + 1 < 29 && LENGTH_BASE[code + 1] as usize <= length {
            code += 1;
        }
        codes[length - 3] = code as u8;
        length += 1;
    }
    codes
}

const LENGTH_CODES: [u8; 256] = length_codes();

/// The code of a distance, its extra bits and their value.
fn distance_code(distance: u32) -> (usize, u32, u32) {
    let zero_based = distance.saturating_sub(1);
    if zero_based < 4 {
        return (zero_based as usize, 0, 0);
    }
    let top = 31 - zero_based.leading_zeros();
    let extra = top - 1;
    let half = (zero_based >> extra) & 1;
    ((2 * top + half) as usize, extra, zero_based & ((1 << extra) - 1))
}

/// The checksum of RFC 1950.
pub fn adler32(bytes: &[u8]) -> u32 {
    const BASE: u32 = 65521;
    let (mut a, mut b) = (1u32, 0u32);
    // The longest run of the largest bytes that fits 32 bits before a division.
    for run in bytes.chunks(5552) {
        for byte in run {
            a += u32::from(*byte);
            b += a;
        }
        (a, b) = (a % BASE, b % BASE);
    }
    b << 16 | a
}

/// Compresses inputs one after the other; what it needs is allocated once.
pub struct Deflater {
    finder: Finder,
    tokens: Vec<Token>,
    literal_counts: [u32; LITERALS],
    distance_counts: [u32; DISTANCES],
}

/// What a block costs and how it is coded.
struct Plan {
    literals: Code<LITERALS>,
    distances: Code<DISTANCES>,
    /// Code lengths of both alphabets as they are stored, run-length coded.
    stored_lengths: Vec<(u8, u8)>,
    length_code: Code<19>,
    stored_length_codes: usize,
    dynamic_bits: u64,
    fixed_bits: u64,
}

impl Deflater {
    /// A compressor that looks back at most `1 << window_bits` bytes, 9 to 15.
    pub fn new(window_bits: u32) -> Deflater {
        Deflater {
            finder: Finder::new(window_bits.clamp(9, 15)),
            tokens: Vec::with_capacity(BLOCK_TOKENS),
            literal_counts: [0; LITERALS],
            distance_counts: [0; DISTANCES],
        }
    }

    /// Appends `input`, at most 1 GiB, as one raw stream to `out`. False, with `out` as it was, when that would take
    /// more than `max_bytes`.
    pub fn deflate(&mut self, input: &[u8], out: &mut Vec<u8>, max_bytes: usize) -> bool {
        let start = out.len();
        let mut writer = BitWriter::new(out);
        self.finder.begin();
        let mut at = 0;
        loop {
            self.tokens.clear();
            let block_start = at;
            at = self.finder.tokens(input, at, &mut self.tokens, BLOCK_TOKENS);
            let last = at >= input.len();
            let raw = input.get(block_start..at).unwrap_or_default();
            self.block(&mut writer, raw, last);
            if writer.bytes() - start > max_bytes {
                break;
            }
            if last {
                writer.finish();
                if out.len() - start <= max_bytes {
                    return true;
                }
                break;
            }
        }
        out.truncate(start);
        false
    }

    fn block(&mut self, writer: &mut BitWriter<'_>, raw: &[u8], last: bool) {
        self.count();
        let plan = self.plan();
        let stored_bits = 8 * (raw.len() as u64 + 5) + 7;
        writer.put(u32::from(last), 1);
        if raw.len() <= 0xffff && stored_bits < plan.dynamic_bits.min(plan.fixed_bits) {
            writer.put(0, 2);
            writer.align();
            writer.put(raw.len() as u32, 16);
            writer.put(!(raw.len() as u32) & 0xffff, 16);
            writer.bytes_as_they_are(raw);
        } else if plan.fixed_bits <= plan.dynamic_bits {
            writer.put(1, 2);
            let (literals, distances) = fixed_codes();
            self.write_tokens(writer, &literals, &distances);
        } else {
            writer.put(2, 2);
            write_codes(writer, &plan);
            self.write_tokens(writer, &plan.literals, &plan.distances);
        }
    }

    fn count(&mut self) {
        self.literal_counts.fill(0);
        self.distance_counts.fill(0);
        for token in &self.tokens {
            match token.as_match() {
                None => self.literal_counts[usize::from(token.literal())] += 1,
                Some((length, distance)) => {
                    let code = LENGTH_CODES[usize::from(length)];
                    self.literal_counts[257 + usize::from(code)] += 1;
                    self.distance_counts[distance_code(distance).0] += 1;
                }
            }
        }
        self.literal_counts[END_OF_BLOCK] = 1;
    }

    fn plan(&self) -> Plan {
        let literals = Code::new(lengths(&self.literal_counts, CODE_BITS_MAX));
        let distances = Code::new(lengths(&self.distance_counts, CODE_BITS_MAX));
        let stored_lengths = run_lengths(&literals, &distances);
        let mut counts = [0u32; 19];
        stored_lengths.iter().for_each(|(symbol, _)| counts[usize::from(*symbol)] += 1);
        let length_code = Code::new(lengths(&counts, LENGTH_BITS_MAX));
        let used = LENGTH_ORDER.iter().rposition(|symbol| length_code.lengths[*symbol] > 0);
        let stored_length_codes = used.map_or(4, |last| last + 1).max(4);
        let header: u64 = stored_lengths
            .iter()
            .map(|(symbol, _)| u64::from(length_code.lengths[usize::from(*symbol)]) + extra_of_run(*symbol))
            .sum();
        let extra = self.extra_bits();
        let (fixed_literals, fixed_distances) = (fixed_literal_lengths(), [5u8; DISTANCES]);
        let cost = |counts: &[u32], lengths: &[u8]| -> u64 {
            counts.iter().zip(lengths).map(|(count, bits)| u64::from(*count) * u64::from(*bits)).sum()
        };
        Plan {
            dynamic_bits: 17
                + 3 * stored_length_codes as u64
                + header
                + extra
                + cost(&self.literal_counts, &literals.lengths)
                + cost(&self.distance_counts, &distances.lengths),
            fixed_bits: 3
                + extra
                + cost(&self.literal_counts, &fixed_literals)
                + cost(&self.distance_counts, &fixed_distances),
            literals,
            distances,
            stored_lengths,
            length_code,
            stored_length_codes,
        }
    }

    fn extra_bits(&self) -> u64 {
        let lengths = self.literal_counts[257..].iter().zip(LENGTH_EXTRA);
        let distances = self.distance_counts.iter().enumerate();
        lengths.map(|(count, extra)| u64::from(*count) * u64::from(extra)).sum::<u64>()
            + distances.map(|(code, count)| u64::from(*count) * (code as u64 / 2).saturating_sub(1)).sum::<u64>()
    }

    fn write_tokens(&self, writer: &mut BitWriter<'_>, literals: &Code<LITERALS>, distances: &Code<DISTANCES>) {
        for token in &self.tokens {
            match token.as_match() {
                None => writer.put_code(literals.of(usize::from(token.literal()))),
                Some((length, distance)) => {
                    let code = usize::from(LENGTH_CODES[usize::from(length)]);
                    writer.put_code(literals.of(257 + code));
                    let extra = u32::from(length) + 3 - u32::from(LENGTH_BASE[code]);
                    writer.put(extra, u32::from(LENGTH_EXTRA[code]));
                    let (code, bits, value) = distance_code(distance);
                    writer.put_code(distances.of(code));
                    writer.put(value, bits);
                }
            }
        }
        writer.put_code(literals.of(END_OF_BLOCK));
    }
}

fn extra_of_run(symbol: u8) -> u64 {
    match symbol {
        16 => 2,
        17 => 3,
        18 => 7,
        _ => 0,
    }
}

fn fixed_literal_lengths() -> [u8; LITERALS] {
    std::array::from_fn(|symbol| match symbol {
        0..=143 => 8,
        144..=255 => 9,
        256..=279 => 7,
        _ => 8,
    })
}

/// The codes of section 3.2.6. The two distance codes that are never used would be the last.
fn fixed_codes() -> (Code<LITERALS>, Code<DISTANCES>) {
    (Code::new(fixed_literal_lengths()), Code::new([5; DISTANCES]))
}

/// How many symbols of an alphabet are stored, at least `least`.
fn used(lengths: &[u8], least: usize) -> usize {
    lengths.iter().rposition(|bits| *bits > 0).map_or(least, |last| (last + 1).max(least))
}

/// Lengths of both alphabets behind each other as symbols with the value of their extra bits. Section 3.2.7.
fn run_lengths(literals: &Code<LITERALS>, distances: &Code<DISTANCES>) -> Vec<(u8, u8)> {
    let (literals, distances) = (&literals.lengths, &distances.lengths);
    let all: Vec<u8> =
        literals.iter().take(used(literals, 257)).chain(distances.iter().take(used(distances, 1))).copied().collect();
    let mut out = Vec::with_capacity(all.len());
    let mut rest = all.as_slice();
    while let Some((&bits, _)) = rest.split_first() {
        let run = rest.iter().take_while(|next| **next == bits).count();
        let mut left = run;
        if bits != 0 {
            out.push((bits, 0));
            left -= 1;
        }
        while left > 0 {
            let (symbol, take) = match (bits, left) {
                (0, 11..) => (18, left.min(138)),
                (0, 3..) => (17, left),
                (1.., 3..) => (16, left.min(6)),
                _ => (bits, 1),
            };
            let extra = match symbol {
                18 => take - 11,
                16 | 17 => take - 3,
                _ => 0,
            };
            out.push((symbol, extra as u8));
            left -= take;
        }
        rest = rest.get(run..).unwrap_or_default();
    }
    out
}

fn write_codes(writer: &mut BitWriter<'_>, plan: &Plan) {
    writer.put(used(&plan.literals.lengths, 257) as u32 - 257, 5);
    writer.put(used(&plan.distances.lengths, 1) as u32 - 1, 5);
    writer.put(plan.stored_length_codes as u32 - 4, 4);
    for symbol in LENGTH_ORDER.iter().take(plan.stored_length_codes) {
        writer.put(u32::from(plan.length_code.lengths[*symbol]), 3);
    }
    for (symbol, extra) in &plan.stored_lengths {
        writer.put_code(plan.length_code.of(usize::from(*symbol)));
        writer.put(u32::from(*extra), extra_of_run(*symbol) as u32);
    }
}

#[cfg(test)]
mod tests;
