//! Repeated strings: chains of positions with the same hash, and a look at the next byte before a match is taken.

/// Shortest match that is looked for. Three bytes rarely cost less than their codes.
const MATCH_MIN: usize = 4;
/// Longest match the format can say.
const MATCH_MAX: usize = 258;
/// Most bits of a hash: twice as many values as a window of the largest size has positions would be 16; 15 stay in
/// the processor's second cache.
const HASH_BITS_MAX: u32 = 15;
/// Positions with the same hash that are looked at.
const CHAIN_MAX: usize = 24;
/// A match as long as this is taken without looking further.
const GOOD_ENOUGH: usize = 48;
/// After this many bytes without a match (log2), steps become longer: what does not repeat rarely begins to.
const PATIENCE_BITS: u32 = 8;
/// Longest step: short enough that repetitions are noticed soon when they begin.
const STRIDE_MAX: usize = 16;
/// Distances go no further back.
const WINDOW_MAX: usize = 1 << 15;
/// No position: too far from any to be in a window.
const NONE: u32 = 1 << 31;

/// A literal, or a match: length minus 3 in bits 16 to 23, distance in the low 16, bit 31 set.
#[derive(Clone, Copy)]
pub(super) struct Token(u32);

impl Token {
    fn matching(length: usize, distance: usize) -> Token {
        Token(1 << 31 | ((length - 3) as u32) << 16 | (distance as u32 & 0xffff))
    }

    /// Length minus 3, and distance.
    pub(super) fn as_match(self) -> Option<(u8, u32)> {
        // The largest distance, 32768, fits 16 bits.
        (self.0 >> 31 == 1).then_some(((self.0 >> 16) as u8, self.0 & 0xffff))
    }

    pub(super) fn literal(self) -> u8 {
        self.0 as u8
    }
}

/// Positions by hash. All inputs start at position 0. In both tables a position is stored as [`stored`] says.
pub(super) struct Finder {
    window: usize,
    /// The newest position with each hash.
    newest: Box<[u32; 1 << HASH_BITS_MAX]>,
    /// Bits of a hash: the smaller the window, the fewer are worth their place in the cache.
    hash_bits: u32,
    /// The position before, with the same hash, of each position in the window. Room for the largest one.
    before: Box<[u32; WINDOW_MAX]>,
    /// Bytes since the last match.
    unmatched: usize,
}

/// A position as the tables hold it, and back: [`NONE`] is 0 there. Fresh memory is zero, and what of a table no input
/// reaches takes no space: that is most of both with a window of 4 KiB.
fn stored(position: u32) -> u32 {
    position ^ NONE
}

/// A table without positions.
fn no_positions<const N: usize>() -> Box<[u32; N]> {
    // The conversion fails for another length only.
    vec![0; N].into_boxed_slice().try_into().unwrap_or_else(|_| Box::new([0; N]))
}

fn eight(input: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(input.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

fn four(input: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(input.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn hash(word: u32, bits: u32) -> usize {
    // The mask changes nothing; it tells that the index is in the table.
    (word.wrapping_mul(0x9e37_79b1) >> (32 - bits)) as usize & ((1 << HASH_BITS_MAX) - 1)
}

/// How many bytes at `a` and `b`, `a` before `b`, are equal, at most `max`.
fn common(input: &[u8], a: usize, b: usize, max: usize) -> usize {
    let mut length = 0;
    while length + 8 <= max {
        let (Some(x), Some(y)) = (eight(input, a + length), eight(input, b + length)) else { break };
        if x != y {
            return length + ((x ^ y).trailing_zeros() / 8) as usize;
        }
        length += 8;
    }
    while length < max && input.get(a + length) == input.get(b + length) {
        length += 1;
    }
    length
}

impl Finder {
    pub(super) fn new(window_bits: u32) -> Finder {
        let window = 1 << window_bits;
        Finder {
            window,
            newest: no_positions(),
            hash_bits: (window_bits + 1).min(HASH_BITS_MAX),
            before: no_positions(),
            unmatched: 0,
        }
    }

    /// Forgets the last input.
    pub(super) fn begin(&mut self) {
        self.newest[..1 << self.hash_bits].fill(stored(NONE));
        self.unmatched = 0;
    }

    fn insert(&mut self, at: usize, word: u32) -> u32 {
        let newest = &mut self.newest[hash(word, self.hash_bits)];
        let last = std::mem::replace(newest, stored(at as u32));
        self.before[at & (self.window - 1) & (WINDOW_MAX - 1)] = last;
        stored(last)
    }

    /// Whether a position lies before `at`, and near enough.
    fn in_window(&self, at: usize, candidate: u32) -> bool {
        ((at as u32).wrapping_sub(candidate).wrapping_sub(1) as usize) < self.window - 1
    }

    /// The longest match for `at` that is longer than `longer_than`, starting the search at `candidate`.
    fn longest(&self, input: &[u8], at: usize, mut candidate: u32, longer_than: usize) -> (usize, usize) {
        let max = MATCH_MAX.min(input.len() - at);
        let (mut length, mut distance) = (longer_than, 0);
        for _ in 0..CHAIN_MAX {
            if !self.in_window(at, candidate) || length >= max {
                break;
            }
            let from = candidate as usize;
            if input.get(from + length) == input.get(at + length) {
                let found = common(input, from, at, max);
                if found > length {
                    (length, distance) = (found, at - from);
                    if found >= GOOD_ENOUGH {
                        break;
                    }
                }
            }
            let next = stored(self.before[from & (self.window - 1) & (WINDOW_MAX - 1)]);
            // A chain goes back in the input; an entry that does not was overwritten.
            if next >= candidate {
                break;
            }
            candidate = next;
        }
        (length, distance)
    }

    /// Appends tokens for `input` from `at` on, until there are about `max_tokens` or the input ends; returns where
    /// it stopped.
    pub(super) fn tokens(&mut self, input: &[u8], mut at: usize, out: &mut Vec<Token>, max_tokens: usize) -> usize {
        while at < input.len() && out.len() + STRIDE_MAX + 1 < max_tokens {
            let Some(word) = four(input, at) else {
                out.extend(input.get(at..).unwrap_or_default().iter().map(|byte| Token(u32::from(*byte))));
                return input.len();
            };
            let candidate = self.insert(at, word);
            // Most positions have no match, and the newest candidate tells.
            let (length, distance) =
                match self.in_window(at, candidate) && four(input, candidate as usize) == Some(word) {
                    true => self.longest(input, at, candidate, MATCH_MIN - 1),
                    false => (0, 0),
                };
            if distance == 0 {
                let stride = 1 + (self.unmatched >> PATIENCE_BITS);
                self.unmatched += 1;
                out.push(Token(word & 0xff));
                at += 1;
                if stride > 1 {
                    let more = (stride - 1).min(STRIDE_MAX).min(input.len() - at);
                    out.extend(input[at..at + more].iter().map(|byte| Token(u32::from(*byte))));
                    self.unmatched += more;
                    at += more;
                }
                continue;
            }
            self.unmatched = 0;
            at = self.take(input, at, length, distance, out);
        }
        at
    }

    /// Takes a match, or the better one that begins a byte later.
    fn take(
        &mut self,
        input: &[u8],
        mut at: usize,
        mut length: usize,
        mut distance: usize,
        out: &mut Vec<Token>,
    ) -> usize {
        while length < GOOD_ENOUGH
            && let Some(word) = four(input, at + 1)
        {
            let candidate = self.insert(at + 1, word);
            let (later_length, later_distance) = self.longest(input, at + 1, candidate, length);
            if later_distance == 0 {
                self.skip(input, at + 2, at + length);
                out.push(Token::matching(length, distance));
                return at + length;
            }
            out.push(Token(u32::from(input[at])));
            at += 1;
            (length, distance) = (later_length, later_distance);
        }
        self.skip(input, at + 1, at + length);
        out.push(Token::matching(length, distance));
        at + length
    }

    /// Makes the positions inside a match known.
    fn skip(&mut self, input: &[u8], from: usize, to: usize) {
        for at in from..to {
            let Some(word) = four(input, at) else { return };
            self.insert(at, word);
        }
    }
}
