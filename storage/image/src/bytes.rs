//! Fields at byte offsets, and a new file as pieces.

/// The bytes at `at`; `None` past the end.
fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// Big-endian u16 at `at`; `None` past the end.
pub(crate) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_be_bytes)
}

/// Big-endian u32 at `at`; `None` past the end.
pub(crate) fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_be_bytes)
}

/// Big-endian u64 at `at`; `None` past the end.
pub(crate) fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    array(bytes, at).map(u64::from_be_bytes)
}

/// Little-endian u16 at `at`; `None` past the end.
pub(crate) fn le16(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_le_bytes)
}

/// Little-endian u32 at `at`; `None` past the end.
pub(crate) fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_le_bytes)
}

/// Little-endian u64 at `at`; `None` past the end.
pub(crate) fn le64(bytes: &[u8], at: usize) -> Option<u64> {
    array(bytes, at).map(u64::from_le_bytes)
}

/// The 16 bytes at `at`; `None` past the end.
pub(crate) fn bytes16(bytes: &[u8], at: usize) -> Option<[u8; 16]> {
    array(bytes, at)
}

/// Copies `field` to `at`. The callers fill buffers of their own with constant offsets; what would not fit
/// is a fault of theirs and is left out.
pub(crate) fn put(out: &mut [u8], at: usize, field: &[u8]) {
    let target = at.checked_add(field.len()).and_then(|end| out.get_mut(at..end));
    debug_assert!(target.is_some(), "a field of {} bytes at {at} does not fit", field.len());
    if let Some(target) = target {
        target.copy_from_slice(field);
    }
}

/// A new image as writes: `pieces` at their offsets, everything else zero up to `file_bytes`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewFile {
    /// Offset and bytes, in ascending order.
    pub pieces: Vec<(u64, Vec<u8>)>,
    /// Length of the file.
    pub file_bytes: u64,
}

#[cfg(test)]
impl NewFile {
    /// The file as bytes, for tests of small ones.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut out = vec![0; self.file_bytes as usize];
        for (offset, bytes) in &self.pieces {
            put(&mut out, *offset as usize, bytes);
        }
        out
    }
}

#[test]
fn fields_end_where_the_bytes_end() {
    let bytes: Vec<u8> = (1..=16).collect();
    assert_eq!((le16(&bytes, 0), le16(&bytes, 14), le16(&bytes, 15)), (Some(0x0201), Some(0x100f), None));
    assert_eq!((be16(&bytes, 14), be16(&bytes, 15)), (Some(0x0f10), None));
    assert_eq!((be32(&bytes, 12), be64(&bytes, 9)), (Some(0x0d0e_0f10), None));
    assert_eq!((le32(&bytes, 12), le32(&bytes, 13)), (Some(0x100f_0e0d), None));
    assert_eq!((le64(&bytes, 8), le64(&bytes, usize::MAX)), (Some(0x100f_0e0d_0c0b_0a09), None));
    assert_eq!((bytes16(&bytes, 0).is_some(), bytes16(&bytes, 1)), (true, None));
}
