//! CRC-32C (Castagnoli), as RFC 3720 appendix B.4 defines it.

/// The polynomial 0x1edc6f41, bits reversed.
const POLYNOMIAL: u32 = 0x82f6_3b78;

const TABLE: [u32; 256] = table();

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 != 0 { crc >> 1 ^ POLYNOMIAL } else { crc >> 1 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
}

/// The checksum of `bytes`, four of which, at `hole`, count as zeroes: where the checksum itself is stored.
pub(crate) fn crc32c_without(bytes: &[u8], hole: usize) -> u32 {
    let before = bytes.get(..hole).unwrap_or(bytes);
    let after = bytes.get(hole.saturating_add(4)..).unwrap_or_default();
    !update(update(update(u32::MAX, before), &[0; 4]), after)
}

fn update(crc: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(crc, |crc, byte| crc >> 8 ^ TABLE[(crc as u8 ^ byte) as usize])
}

#[test]
fn values_of_rfc_3720() {
    let ascending: Vec<u8> = (0..32).collect();
    let descending: Vec<u8> = (0..32).rev().collect();
    for (bytes, want) in [
        (vec![0; 32], 0x8a91_36aa),
        (vec![0xff; 32], 0x62a8_ab43),
        (ascending, 0x46dd_794e),
        (descending, 0x113f_db5c),
        (b"123456789".to_vec(), 0xe306_9283),
    ] {
        assert_eq!(!update(u32::MAX, &bytes), want);
    }
    assert_eq!(crc32c_without(&[&[0; 8][..], &[1, 2, 3, 4], &[0; 20]].concat(), 8), 0x8a91_36aa);
}
