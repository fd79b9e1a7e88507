//! Refcounts inside a refcount block: 1 to 64 bits each. Sub-byte counts fill a byte from bit 0 up.

/// The refcount at `index` in (a piece of) a refcount block; `None` past its end.
pub fn get(block: &[u8], order: u32, index: usize) -> Option<u64> {
    match order {
        0..=2 => {
            let bits = 1u32 << order;
            let per_byte = 8 >> order;
            let byte = *block.get(index / per_byte)?;
            let shift = (index % per_byte) as u32 * bits;
            Some(u64::from((byte >> shift) & (0xffu8 >> (8 - bits))))
        }
        3 => block.get(index).map(|byte| u64::from(*byte)),
        4 => crate::be16(block, index.checked_mul(2)?).map(u64::from),
        5 => crate::be32(block, index.checked_mul(4)?).map(u64::from),
        6 => crate::be64(block, index.checked_mul(8)?),
        _ => None,
    }
}

/// Stores a refcount; false, with nothing changed, past the end or when the value does not fit.
#[must_use]
pub fn set(block: &mut [u8], order: u32, index: usize, value: u64) -> bool {
    if order > 6 || value > u64::MAX >> (64 - (1u32 << order)) {
        return false;
    }
    if order <= 2 {
        let bits = 1u32 << order;
        let per_byte = 8 >> order;
        let shift = (index % per_byte) as u32 * bits;
        let mask = (0xffu8 >> (8 - bits)) << shift;
        let Some(byte) = block.get_mut(index / per_byte) else { return false };
        *byte = (*byte & !mask) | (((value as u8) << shift) & mask);
        return true;
    }
    let bytes = 1usize << (order - 3);
    let target = index.checked_mul(bytes).and_then(|at| block.get_mut(at..at.checked_add(bytes)?));
    let Some(target) = target else { return false };
    let big_endian = value.to_be_bytes();
    target.copy_from_slice(&big_endian[8 - bytes..]);
    true
}

#[test]
fn layout_of_every_width() {
    // Bytes typed from the specification: "refcount_bits = 1 << refcount_order", bit 0 first below a byte.
    for (order, index, value, want) in [
        (0, 9, 1, vec![0, 2, 0, 0, 0, 0, 0, 0]),
        (1, 1, 3, vec![0x0c, 0, 0, 0, 0, 0, 0, 0]),
        (2, 3, 0xa, vec![0, 0xa0, 0, 0, 0, 0, 0, 0]),
        (3, 2, 0xff, vec![0, 0, 0xff, 0, 0, 0, 0, 0]),
        (4, 1, 0x102, vec![0, 0, 1, 2, 0, 0, 0, 0]),
        (5, 1, 0x0102_0304, vec![0, 0, 0, 0, 1, 2, 3, 4]),
        (6, 0, 0x0102_0304_0506_0708, vec![1, 2, 3, 4, 5, 6, 7, 8]),
    ] {
        let mut block = vec![0u8; 8];
        assert!(set(&mut block, order, index, value));
        assert_eq!(block, want, "order {order}");
        assert_eq!(get(&block, order, index), Some(value));
        assert!(set(&mut block, order, index, 0));
        assert_eq!(block, [0; 8]);
    }
}

#[test]
fn values_and_indices_out_of_range_change_nothing() {
    let mut block = [0u8; 8];
    assert!(!set(&mut block, 0, 0, 2));
    assert!(!set(&mut block, 4, 0, 65536));
    assert!(!set(&mut block, 4, 4, 1));
    assert!(!set(&mut block, 6, usize::MAX, 1));
    assert_eq!((block, get(&block, 4, 4), get(&block, 7, 0)), ([0; 8], None, None));
}
