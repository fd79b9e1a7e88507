//! Bits into bytes, the first bit lowest. RFC 1951 section 3.1.1.

/// Appends bits to a vector.
pub(super) struct BitWriter<'a> {
    out: &'a mut Vec<u8>,
    pending: u64,
    /// Bits in `pending`; below 32 between calls.
    count: u32,
}

impl<'a> BitWriter<'a> {
    pub(super) fn new(out: &'a mut Vec<u8>) -> BitWriter<'a> {
        BitWriter { out, pending: 0, count: 0 }
    }

    /// Bytes in the vector so far.
    pub(super) fn bytes(&self) -> usize {
        self.out.len()
    }

    /// The low `bits`, at most 16, of a value that has no others.
    pub(super) fn put(&mut self, value: u32, bits: u32) {
        self.pending |= u64::from(value) << self.count;
        self.count += bits;
        if self.count >= 32 {
            self.out.extend_from_slice(&(self.pending as u32).to_le_bytes());
            self.pending >>= 32;
            self.count -= 32;
        }
    }

    /// A code and its length.
    pub(super) fn put_code(&mut self, (code, bits): (u32, u32)) {
        self.put(code, bits);
    }

    /// Fills the last byte with zeroes.
    pub(super) fn align(&mut self) {
        let bytes = self.count.div_ceil(8) as usize;
        let pending = self.pending.to_le_bytes();
        self.out.extend_from_slice(pending.get(..bytes).unwrap_or_default());
        (self.pending, self.count) = (0, 0);
    }

    /// Whole bytes; aligned before, and with less than 4 of them pending.
    pub(super) fn bytes_as_they_are(&mut self, bytes: &[u8]) {
        self.align();
        self.out.extend_from_slice(bytes);
    }

    pub(super) fn finish(mut self) {
        self.align();
    }
}
