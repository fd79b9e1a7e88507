//! Huffman codes with bounded lengths.

/// A canonical code: section 3.2.2. Codes are stored with their first bit lowest, as they are written.
pub(super) struct Code<const N: usize> {
    /// Bits of each symbol's code; 0 for symbols that do not occur.
    pub(super) lengths: [u8; N],
    /// Code in the low 16 bits, its length above.
    codes: [u32; N],
}

impl<const N: usize> Code<N> {
    pub(super) fn new(lengths: [u8; N]) -> Code<N> {
        let mut per_length = [0u16; 17];
        lengths.iter().filter(|bits| **bits > 0).for_each(|bits| per_length[usize::from(*bits)] += 1);
        let mut next = [0u16; 17];
        for bits in 1..16 {
            next[bits + 1] = (next[bits] + per_length[bits]) << 1;
        }
        let mut codes = [0; N];
        for (code, bits) in codes.iter_mut().zip(lengths).filter(|(_, bits)| *bits > 0) {
            let value = &mut next[usize::from(bits)];
            *code = u32::from(value.reverse_bits() >> (16 - bits)) | u32::from(bits) << 16;
            *value += 1;
        }
        Code { lengths, codes }
    }

    /// Code and length of a symbol.
    pub(super) fn of(&self, symbol: usize) -> (u32, u32) {
        let code = self.codes[symbol];
        (code & 0xffff, code >> 16)
    }
}

/// Code lengths of at most `max_bits` for symbols that occur `counts` times. A single symbol gets one bit.
pub(super) fn lengths<const N: usize>(counts: &[u32; N], max_bits: u32) -> [u8; N] {
    let mut out = [0; N];
    // Rarest first. Symbols fit 9 bits, counts 23: a block has fewer tokens.
    let mut order: Vec<u32> = counts
        .iter()
        .enumerate()
        .filter(|(_, count)| **count > 0)
        .map(|(symbol, count)| (*count).min((1 << 23) - 1) << 9 | symbol as u32)
        .collect();
    order.sort_unstable();
    let symbol = |entry: u32| (entry & 0x1ff) as usize;
    if order.len() < 2 {
        order.iter().for_each(|entry| out[symbol(*entry)] = 1);
        return out;
    }
    let depths = depths(&order.iter().map(|entry| u64::from(entry >> 9)).collect::<Vec<u64>>());
    // How many symbols have each length; those that are too deep are lifted.
    let mut per_length = vec![0u32; max_bits as usize + 1];
    depths.iter().for_each(|depth| per_length[(*depth).min(max_bits) as usize] += 1);
    let mut total: u64 =
        per_length.iter().enumerate().skip(1).map(|(bits, n)| u64::from(*n) << (max_bits as usize - bits)).sum();
    while total > 1 << max_bits {
        // One of the deepest that can sink by a bit makes room for one of the lifted.
        let Some(bits) = (1..max_bits as usize).rev().find(|bits| per_length[*bits] > 0) else { break };
        per_length[bits] -= 1;
        per_length[bits + 1] += 2;
        per_length[max_bits as usize] -= 1;
        total -= 1;
    }
    // The rarest get the longest.
    let mut entries = order.iter();
    for bits in (1..=max_bits as usize).rev() {
        for entry in entries.by_ref().take(per_length[bits] as usize) {
            out[symbol(*entry)] = bits as u8;
        }
    }
    out
}

/// Depth of each leaf in an optimal tree; `counts` ascend, at least two of them. Two queues: the leaves, and the inner
/// nodes, which come into being in ascending order.
fn depths(counts: &[u64]) -> Vec<u32> {
    let leaves = counts.len();
    let mut parent = vec![0usize; 2 * leaves - 1];
    let mut inner: Vec<u64> = Vec::with_capacity(leaves - 1);
    let (mut next_leaf, mut next_inner) = (0, 0);
    while inner.len() < leaves - 1 {
        let node = leaves + inner.len();
        let mut sum = 0;
        for _ in 0..2 {
            let leaf = counts.get(next_leaf).copied();
            let joined = inner.get(next_inner).copied();
            if leaf.is_some_and(|leaf| joined.is_none_or(|joined| leaf <= joined)) {
                sum += leaf.unwrap_or(0);
                parent[next_leaf] = node;
                next_leaf += 1;
            } else {
                sum += joined.unwrap_or(0);
                parent[leaves + next_inner] = node;
                next_inner += 1;
            }
        }
        inner.push(sum);
    }
    let mut depth = vec![0u32; 2 * leaves - 1];
    for node in (0..2 * leaves - 2).rev() {
        depth[node] = depth[parent[node]] + 1;
    }
    depth.truncate(leaves);
    depth
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kraft<const N: usize>(lengths: &[u8; N]) -> f64 {
        lengths.iter().filter(|bits| **bits > 0).map(|bits| 0.5f64.powi(i32::from(*bits))).sum()
    }

    #[test]
    fn common_symbols_get_short_codes_and_codes_fill_the_space() {
        assert_eq!(lengths(&[5, 1, 1, 0, 2], 15), [1, 3, 3, 0, 2]);
        assert_eq!(lengths(&[0, 7, 0], 15), [0, 1, 0]);
        assert_eq!(lengths(&[0; 3], 15), [0; 3]);
    }

    #[test]
    fn fibonacci_counts_stay_within_the_limit() {
        let mut counts = [0u32; 30];
        let (mut a, mut b) = (1, 1);
        for count in &mut counts {
            *count = a;
            (a, b) = (b, (a + b).min(1 << 22));
        }
        for max_bits in [7, 9, 15] {
            let lengths = lengths(&counts, max_bits);
            assert!(lengths.iter().all(|bits| (1..=max_bits as u8).contains(bits)), "{lengths:?}");
            assert!((kraft(&lengths) - 1.0).abs() < 1e-9, "{max_bits}: {lengths:?}");
        }
    }

    #[test]
    fn the_codes_of_the_specifications_example() {
        // RFC 1951 section 3.2.2: lengths (3, 3, 3, 3, 3, 2, 4, 4) give 010 .. 110, 00, 1110, 1111.
        let code = Code::new([3, 3, 3, 3, 3, 2, 4, 4]);
        let written: Vec<String> = (0..8)
            .map(|symbol| {
                let (bits, len) = code.of(symbol);
                (0..len).map(|bit| if bits >> bit & 1 == 1 { '1' } else { '0' }).collect()
            })
            .collect();
        assert_eq!(written, ["010", "011", "100", "101", "110", "00", "1110", "1111"]);
    }
}
