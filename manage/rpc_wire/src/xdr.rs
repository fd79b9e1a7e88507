//! XDR (RFC 4506) with limits in the types: 4-byte units, big endian, zero padding.
//!
//! Two leniencies, both needed by real clients: an optional's discriminator may be any non-zero word (one client pads a
//! 3-byte array there), and padding bytes are not looked at (the C decoder does not either). Strings are bytes without
//! NUL; UTF-8 is not promised by the protocol.

use std::borrow::Cow;
use std::fmt;

/// Longest string the protocol carries, in bytes.
pub const STRING_MAX: usize = 4 << 20;

/// Why bytes are not the value that was asked for. Decoding has no side effects, so nothing else has happened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum XdrError {
    /// The input ended early.
    #[error("payload ends {missing} bytes before the end of a value")]
    Short {
        /// Bytes that were needed and are not there.
        missing: usize,
    },
    /// A length exceeds its limit.
    #[error("length {found} of {what} is over the limit of {limit}")]
    TooLong {
        /// Kind of value that was being read.
        what: &'static str,
        /// Length found in the input.
        found: usize,
        /// Largest length allowed.
        limit: usize,
    },
    /// A string contains a NUL byte.
    #[error("a string contains a NUL byte at offset {offset}")]
    NulInString {
        /// Offset of the byte in the string.
        offset: usize,
    },
    /// A union has a discriminator nobody defined.
    #[error("unknown discriminator {found} of {what}")]
    UnknownArm {
        /// Union that was being read.
        what: &'static str,
        /// Discriminator found.
        found: i32,
    },
    /// Bytes remain after the last value.
    #[error("{left} bytes remain after the last value")]
    Trailing {
        /// How many.
        left: usize,
    },
}

/// A value with an XDR form.
pub trait Xdr: Sized {
    /// Fewest bytes any value of the type takes: bounds what a length may promise.
    const MIN_BYTES: usize;
    /// Appends the value to `out`.
    fn encode(&self, out: &mut Vec<u8>);
    /// Reads one value and moves past it.
    fn decode(input: &mut Decoder<'_>) -> Result<Self, XdrError>;
}

/// A cursor over a payload.
#[derive(Clone, Debug)]
pub struct Decoder<'a> {
    rest: &'a [u8],
}

impl<'a> Decoder<'a> {
    /// Starts at the first byte.
    pub fn new(bytes: &'a [u8]) -> Decoder<'a> {
        Decoder { rest: bytes }
    }

    /// Bytes not read yet.
    pub fn remaining(&self) -> &'a [u8] {
        self.rest
    }

    /// Takes `len` bytes and the padding after them.
    fn padded(&mut self, len: usize) -> Result<&'a [u8], XdrError> {
        let taken = self.take(len)?;
        self.take(padding(len))?;
        Ok(taken)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], XdrError> {
        match self.rest.split_at_checked(len) {
            Some((head, rest)) => {
                self.rest = rest;
                Ok(head)
            }
            None => Err(XdrError::Short { missing: len - self.rest.len() }),
        }
    }

    fn word(&mut self) -> Result<[u8; 4], XdrError> {
        match self.rest.split_first_chunk::<4>() {
            Some((word, rest)) => {
                self.rest = rest;
                Ok(*word)
            }
            None => Err(XdrError::Short { missing: 4 - self.rest.len() }),
        }
    }

    /// Reads a length word that must not exceed `limit`.
    fn length(&mut self, what: &'static str, limit: usize) -> Result<usize, XdrError> {
        let found = u32::decode(self)? as usize;
        if found > limit {
            return Err(XdrError::TooLong { what, found, limit });
        }
        Ok(found)
    }
}

/// Decodes one value that fills `bytes` exactly.
pub fn from_bytes<T: Xdr>(bytes: &[u8]) -> Result<T, XdrError> {
    let mut input = Decoder::new(bytes);
    let value = T::decode(&mut input)?;
    match input.rest.len() {
        0 => Ok(value),
        left => Err(XdrError::Trailing { left }),
    }
}

/// Encodes one value on its own.
pub fn to_bytes<T: Xdr>(value: &T) -> Vec<u8> {
    let mut out = Vec::new();
    value.encode(&mut out);
    out
}

fn padding(len: usize) -> usize {
    len.wrapping_neg() & 3
}

fn put_padded(bytes: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(bytes);
    out.extend_from_slice(&[0; 3][..padding(bytes.len())]);
}

/// Writes a length word. Lists we send are bounded by their producers; a longer one would be a bug of ours.
fn put_length(len: usize, out: &mut Vec<u8>) {
    debug_assert!(len <= u32::MAX as usize);
    (len as u32).encode(out);
}

macro_rules! number {
    ($($ty:ty: $bytes:tt),*) => {$(
        impl Xdr for $ty {
            const MIN_BYTES: usize = $bytes;
            fn encode(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_be_bytes());
            }
            fn decode(input: &mut Decoder<'_>) -> Result<Self, XdrError> {
                number!(@decode $bytes, input).map(<$ty>::from_be_bytes)
            }
        }
    )*};
    (@decode 4, $input:ident) => { $input.word() };
    (@decode 8, $input:ident) => {
        $input.word().and_then(|high| {
            let [a, b, c, d] = high;
            let [e, f, g, h] = $input.word()?;
            Ok([a, b, c, d, e, f, g, h])
        })
    };
}
number!(i32: 4, u32: 4, i64: 8, u64: 8, f64: 8);

impl Xdr for () {
    const MIN_BYTES: usize = 0;
    fn encode(&self, _: &mut Vec<u8>) {}
    fn decode(_: &mut Decoder<'_>) -> Result<Self, XdrError> {
        Ok(())
    }
}

impl<T: Xdr> Xdr for Option<T> {
    const MIN_BYTES: usize = 4;
    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            None => 0u32.encode(out),
            Some(value) => {
                1u32.encode(out);
                value.encode(out);
            }
        }
    }
    fn decode(input: &mut Decoder<'_>) -> Result<Self, XdrError> {
        match u32::decode(input)? {
            0 => Ok(None),
            _ => T::decode(input).map(Some),
        }
    }
}

/// A string: bytes without NUL, at most [`STRING_MAX`].
#[derive(Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct XStr(pub Vec<u8>);

impl XStr {
    /// The bytes as text; anything that is not UTF-8 becomes U+FFFD.
    pub fn lossy(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.0)
    }

    /// The bytes as text, if they are UTF-8.
    pub fn as_str(&self) -> Option<&str> {
        std::str::from_utf8(&self.0).ok()
    }
}

impl fmt::Debug for XStr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.lossy(), f)
    }
}

impl From<&str> for XStr {
    fn from(text: &str) -> XStr {
        XStr(text.as_bytes().to_vec())
    }
}

impl From<String> for XStr {
    fn from(text: String) -> XStr {
        XStr(text.into_bytes())
    }
}

impl Xdr for XStr {
    const MIN_BYTES: usize = 4;
    fn encode(&self, out: &mut Vec<u8>) {
        // What we say may quote what we were told: a NUL ends the string, as it would in the C library.
        let end = self.0.iter().position(|&byte| byte == 0).unwrap_or(self.0.len()).min(STRING_MAX);
        put_length(end, out);
        put_padded(&self.0[..end], out);
    }
    fn decode(input: &mut Decoder<'_>) -> Result<Self, XdrError> {
        let len = input.length("string", STRING_MAX)?;
        let bytes = input.padded(len)?;
        if let Some(offset) = bytes.iter().position(|&byte| byte == 0) {
            return Err(XdrError::NulInString { offset });
        }
        Ok(XStr(bytes.to_vec()))
    }
}

/// `opaque name<MAX>`: bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Opaque<const MAX: usize>(pub Vec<u8>);

impl<const MAX: usize> Xdr for Opaque<MAX> {
    const MIN_BYTES: usize = 4;
    fn encode(&self, out: &mut Vec<u8>) {
        put_length(self.0.len(), out);
        put_padded(&self.0, out);
    }
    fn decode(input: &mut Decoder<'_>) -> Result<Self, XdrError> {
        let len = input.length("opaque data", MAX)?;
        Ok(Opaque(input.padded(len)?.to_vec()))
    }
}

/// `opaque uuid[16]`.
impl Xdr for [u8; 16] {
    const MIN_BYTES: usize = 16;
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self);
    }
    fn decode(input: &mut Decoder<'_>) -> Result<Self, XdrError> {
        let mut uuid = [0; 16];
        uuid.copy_from_slice(input.take(16)?);
        Ok(uuid)
    }
}

/// `T name<MAX>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct List<T, const MAX: usize>(pub Vec<T>);

impl<T, const MAX: usize> Default for List<T, MAX> {
    fn default() -> Self {
        List(Vec::new())
    }
}

impl<T: Xdr, const MAX: usize> Xdr for List<T, MAX> {
    const MIN_BYTES: usize = 4;
    fn encode(&self, out: &mut Vec<u8>) {
        put_length(self.0.len(), out);
        for item in &self.0 {
            item.encode(out);
        }
    }
    fn decode(input: &mut Decoder<'_>) -> Result<Self, XdrError> {
        let len = input.length("list", MAX)?;
        // The bytes must be there before the memory is: a length alone costs a client nothing.
        let need = len.saturating_mul(T::MIN_BYTES);
        if need > input.rest.len() {
            return Err(XdrError::Short { missing: need - input.rest.len() });
        }
        let mut items = Vec::with_capacity(len);
        for _ in 0..len {
            items.push(T::decode(input)?);
        }
        Ok(List(items))
    }
}

/// `char name[N]` or `char name<N>` as rpcgen reads it: every character is a word of its own. Holds the text before the
/// first NUL; the fixed form is padded with zero words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CharArray<const N: usize>(pub Vec<u8>);

impl<const N: usize> Xdr for CharArray<N> {
    const MIN_BYTES: usize = N * 4;
    fn encode(&self, out: &mut Vec<u8>) {
        for index in 0..N {
            // The last word stays zero: readers expect a terminated string.
            let byte = if index + 1 < N { self.0.get(index).copied().unwrap_or(0) } else { 0 };
            u32::from(byte).encode(out);
        }
    }
    fn decode(input: &mut Decoder<'_>) -> Result<Self, XdrError> {
        let mut text = Vec::new();
        let mut ended = false;
        for _ in 0..N {
            let [.., byte] = input.word()?;
            ended |= byte == 0;
            if !ended {
                text.push(byte);
            }
        }
        Ok(CharArray(text))
    }
}

/// `char name<MAX>`: a length word, then a word per character, terminating NUL included.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CharList<const MAX: usize>(pub Vec<u8>);

impl<const MAX: usize> Xdr for CharList<MAX> {
    const MIN_BYTES: usize = 4;
    fn encode(&self, out: &mut Vec<u8>) {
        let text = &self.0[..self.0.len().min(MAX - 1)];
        put_length(text.len() + 1, out);
        for &byte in text.iter().chain(&[0]) {
            u32::from(byte).encode(out);
        }
    }
    fn decode(input: &mut Decoder<'_>) -> Result<Self, XdrError> {
        let words = List::<u32, MAX>::decode(input)?.0;
        Ok(CharList(words.iter().map(|word| *word as u8).take_while(|&byte| byte != 0).collect()))
    }
}

/// Defines structs whose XDR form is their fields in order.
macro_rules! xdr_struct {
    ($($(#[$meta:meta])* pub struct $name:ident { $($(#[$fmeta:meta])* $field:ident: $ty:ty),* $(,)? })*) => {$(
        $(#[$meta])*
        // Field names are the protocol's own; their meaning is the API's.
        #[allow(missing_docs)]
        #[derive(Clone, Debug, PartialEq)]
        pub struct $name { $($(#[$fmeta])* pub $field: $ty),* }
        impl $crate::xdr::Xdr for $name {
            const MIN_BYTES: usize = 0 $(+ <$ty as $crate::xdr::Xdr>::MIN_BYTES)*;
            #[allow(unused_variables)]
            fn encode(&self, out: &mut Vec<u8>) {
                $($crate::xdr::Xdr::encode(&self.$field, out);)*
            }
            #[allow(unused_variables)]
            fn decode(input: &mut $crate::xdr::Decoder<'_>) -> Result<Self, $crate::xdr::XdrError> {
                Ok($name { $($field: $crate::xdr::Xdr::decode(input)?),* })
            }
        }
    )*};
}
pub(crate) use xdr_struct;

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn check<T: Xdr + PartialEq + fmt::Debug>(value: T, expected: &str) {
        let bytes = to_bytes(&value);
        assert_eq!(hex(&bytes), expected, "{value:?}");
        assert_eq!(from_bytes::<T>(&bytes).unwrap(), value);
        for end in 0..bytes.len() {
            assert!(matches!(from_bytes::<T>(&bytes[..end]), Err(XdrError::Short { .. })), "{value:?} cut at {end}");
        }
    }

    #[test]
    fn values_take_the_bytes_of_rfc_4506() {
        check(-1i32, "ffffffff");
        check(0x0102_0304u32, "01020304");
        check(-2i64, "fffffffffffffffe");
        check(1u64 << 40, "0000010000000000");
        check(1.5f64, "3ff8000000000000");
        check(XStr::from(""), "00000000");
        check(XStr::from("abcd"), "0000000461626364");
        check(XStr::from("abcde"), "000000056162636465000000");
        check(Some(7u32), "0000000100000007");
        check(None::<u32>, "00000000");
        check(List::<u32, 4>(vec![1, 2]), "000000020000000100000002");
        check(Opaque::<8>(vec![9]), "0000000109000000");
        check(CharArray::<3>(b"ab".to_vec()), "000000610000006200000000");
        check(CharList::<8>(b"a".to_vec()), "000000020000006100000000");
    }

    #[test]
    fn what_real_clients_send_is_accepted() {
        // A Go client's optional: a padded 3-byte array in place of the discriminator.
        assert_eq!(from_bytes::<Option<XStr>>(&[1, 0, 0, 0, 0, 0, 0, 1, b'q', 0, 0, 0]), Ok(Some(XStr::from("q"))));
        // Bytes that are not UTF-8, and padding that is not zero.
        assert_eq!(from_bytes::<XStr>(&[0, 0, 0, 1, 0xff, 1, 2, 3]), Ok(XStr(vec![0xff])));
    }

    #[test]
    fn lies_about_lengths_cost_no_memory() {
        let check = |bytes: &[u8], expected| assert_eq!(from_bytes::<List<[u8; 16], 16384>>(bytes), Err(expected));
        check(&[0xff; 4], XdrError::TooLong { what: "list", found: 0xffff_ffff, limit: 16384 });
        check(&[0, 0, 0x40, 0], XdrError::Short { missing: 16384 * 16 });
        assert_eq!(
            from_bytes::<XStr>(&[0x00, 0x40, 0x00, 0x01]),
            Err(XdrError::TooLong { what: "string", found: STRING_MAX + 1, limit: STRING_MAX })
        );
        assert_eq!(from_bytes::<XStr>(b"\0\0\0\x04a\0bc"), Err(XdrError::NulInString { offset: 1 }));
        assert_eq!(from_bytes::<u32>(&[0; 8]), Err(XdrError::Trailing { left: 4 }));
    }
}
