//! Requests and replies. Spec, "Transmission phase".

use super::{CHUNK_MAGIC, Fields, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, WireError};

/// What an export can do, as the server says.
#[allow(missing_docs, reason = "the spec's names")]
pub mod transmission_flag {
    pub const HAS_FLAGS: u16 = 1 << 0;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const ROTATIONAL: u16 = 1 << 4;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_RESIZE: u16 = 1 << 9;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Numbers of commands.
#[allow(missing_docs, reason = "the spec's names")]
pub mod command {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
    /// Of the extension RESIZE: the offset is the new size.
    pub const RESIZE: u16 = 8;
}

/// Flags of a command.
#[allow(missing_docs, reason = "the spec's names")]
pub mod command_flag {
    pub const FUA: u16 = 1 << 0;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Kinds of chunks. Errors have the highest bit set.
#[allow(missing_docs, reason = "the spec's names")]
pub mod chunk {
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const ERROR_BIT: u16 = 1 << 15;
    pub const ERROR: u16 = ERROR_BIT | 1;
    pub const ERROR_OFFSET: u16 = ERROR_BIT | 2;
    /// Flag: the last chunk of the reply.
    pub const DONE: u16 = 1;
}

/// A request without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Of [`command_flag`].
    pub flags: u16,
    /// Of [`command`].
    pub command: u16,
    /// Which reply belongs to it.
    pub cookie: u64,
    /// In bytes.
    pub offset: u64,
    /// In bytes.
    pub length: u32,
}

impl Request {
    /// Its length.
    pub const BYTES: usize = 28;

    /// Takes it apart.
    pub fn decode(bytes: &[u8; Request::BYTES]) -> Result<Request, WireError> {
        let mut fields = Fields::of("a request", bytes);
        let magic = fields.u32()?;
        if magic != REQUEST_MAGIC {
            return Err(WireError::Magic { what: "a request", found: u64::from(magic) });
        }
        Ok(Request {
            flags: fields.u16()?,
            command: fields.u16()?,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            length: fields.u32()?,
        })
    }

    /// Whether it changes what the export holds.
    pub fn writes(&self) -> bool {
        matches!(self.command, command::WRITE | command::TRIM | command::WRITE_ZEROES)
    }

    /// Appends it.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let Request { flags, command, cookie, offset, length } = self;
        out.extend(REQUEST_MAGIC.to_be_bytes());
        out.extend(flags.to_be_bytes());
        out.extend(command.to_be_bytes());
        out.extend(cookie.to_be_bytes());
        out.extend(offset.to_be_bytes());
        out.extend(length.to_be_bytes());
    }
}

/// Head of one chunk of a structured reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// [`chunk::DONE`].
    pub flags: u16,
    /// Of [`chunk`].
    pub kind: u16,
    /// Which request it belongs to.
    pub cookie: u64,
    /// Bytes that follow.
    pub length: u32,
}

/// Head of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyHeader {
    /// A simple one.
    Simple {
        /// 0, or what went wrong.
        error: u32,
        /// Which request it belongs to.
        cookie: u64,
    },
    /// A chunk of a structured one.
    Chunk(Chunk),
}

impl ReplyHeader {
    /// How many bytes both kinds have at least.
    pub const SHORT_BYTES: usize = 16;
    /// How many more a chunk's has.
    pub const MORE_BYTES: usize = 4;

    /// Whether the head is the long one.
    pub fn is_long(short: &[u8; ReplyHeader::SHORT_BYTES]) -> bool {
        short.starts_with(&CHUNK_MAGIC.to_be_bytes())
    }

    /// Takes a head apart: [`ReplyHeader::SHORT_BYTES`], and more if it is long.
    pub fn decode(bytes: &[u8]) -> Result<ReplyHeader, WireError> {
        let mut fields = Fields::of("a reply", bytes);
        let header = match fields.u32()? {
            SIMPLE_REPLY_MAGIC => ReplyHeader::Simple { error: fields.u32()?, cookie: fields.u64()? },
            CHUNK_MAGIC => {
                let (flags, kind) = (fields.u16()?, fields.u16()?);
                ReplyHeader::Chunk(Chunk { flags, kind, cookie: fields.u64()?, length: fields.u32()? })
            }
            other => return Err(WireError::Magic { what: "a reply", found: u64::from(other) }),
        };
        Ok(header)
    }
}

/// Appends a simple reply.
pub fn encode_simple(out: &mut Vec<u8>, error: u32, cookie: u64) {
    out.extend(SIMPLE_REPLY_MAGIC.to_be_bytes());
    out.extend(error.to_be_bytes());
    out.extend(cookie.to_be_bytes());
}

/// Appends the head of a chunk.
pub fn encode_chunk(out: &mut Vec<u8>, head: &Chunk) {
    let Chunk { flags, kind, cookie, length } = head;
    out.extend(CHUNK_MAGIC.to_be_bytes());
    out.extend(flags.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(cookie.to_be_bytes());
    out.extend(length.to_be_bytes());
}

/// Appends a last chunk that tells of an error. `text` is shorter than 4 KiB.
pub fn encode_error(out: &mut Vec<u8>, cookie: u64, error: u32, text: &str) {
    let length = 6 + text.len() as u32;
    encode_chunk(out, &Chunk { flags: chunk::DONE, kind: chunk::ERROR, cookie, length });
    out.extend(error.to_be_bytes());
    out.extend((text.len() as u16).to_be_bytes());
    out.extend(text.as_bytes());
}

/// A run of blocks in a reply about block status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRun {
    /// Its length.
    pub bytes: u32,
    /// [`super::STATE_HOLE`] and [`super::STATE_ZERO`].
    pub state: u32,
}

/// Appends a chunk with the block status of one context; `is_last` ends the answer.
pub fn encode_block_status(out: &mut Vec<u8>, cookie: u64, context: u32, runs: &[BlockRun], is_last: bool) {
    let length = 4 + 8 * runs.len() as u32;
    let flags = if is_last { chunk::DONE } else { 0 };
    encode_chunk(out, &Chunk { flags, kind: chunk::BLOCK_STATUS, cookie, length });
    out.extend(context.to_be_bytes());
    for BlockRun { bytes, state } in runs {
        out.extend(bytes.to_be_bytes());
        out.extend(state.to_be_bytes());
    }
}

/// Payload of a block status chunk: context and runs, none of them empty.
pub fn decode_block_status(payload: &[u8]) -> Result<(u32, Vec<BlockRun>), WireError> {
    let mut fields = Fields::of("block status", payload);
    let context = fields.u32()?;
    let mut runs = Vec::with_capacity(payload.len() / 8);
    while !fields.is_empty() {
        let run = BlockRun { bytes: fields.u32()?, state: fields.u32()? };
        if run.bytes == 0 {
            return Err(WireError::NoBlocks);
        }
        runs.push(run);
    }
    if runs.is_empty() { Err(WireError::NoBlocks) } else { Ok((context, runs)) }
}

/// Offset in front of a data chunk's data.
pub fn decode_offset(bytes: &[u8]) -> Result<u64, WireError> {
    Fields::of("a chunk of data", bytes).u64()
}

/// Payload of a hole chunk: offset and length.
pub fn decode_hole(payload: &[u8]) -> Result<(u64, u32), WireError> {
    let mut fields = Fields::of("a hole", payload);
    let hole = (fields.u64()?, fields.u32()?);
    fields.end()?;
    Ok(hole)
}

/// Payload of an error chunk: number and text. An offset behind it tells where; that it is there is checked.
pub fn decode_error(kind: u16, payload: &[u8]) -> Result<(u32, String), WireError> {
    let mut fields = Fields::of("an error", payload);
    let error = fields.u32()?;
    if error == 0 {
        return Err(WireError::NoError);
    }
    let length = fields.u16()?;
    let text = fields.text(u32::from(length))?;
    if kind == chunk::ERROR_OFFSET {
        fields.u64()?;
    }
    // Chunks of kinds that came later may carry more.
    if kind == chunk::ERROR || kind == chunk::ERROR_OFFSET {
        fields.end()?;
    }
    Ok((error, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_what_the_spec_draws() {
        let request = Request { flags: 1, command: 6, cookie: 0x0102_0304_0506_0708, offset: 0x1000, length: 0x200 };
        let mut bytes = Vec::new();
        request.encode(&mut bytes);
        let want = b"\x25\x60\x95\x13\0\x01\0\x06\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\0\0\0\x10\0\0\0\x02\0";
        assert_eq!(bytes, want);
        assert_eq!(Request::decode(want), Ok(request));
        let mut wrong = *want;
        wrong[0] = 0;
        assert_eq!(Request::decode(&wrong), Err(WireError::Magic { what: "a request", found: 0x0060_9513 }));
    }

    #[test]
    fn replies_are_told_apart() {
        let simple = b"\x67\x44\x66\x98\0\0\0\x05\0\0\0\0\0\0\0\x09";
        assert_eq!(ReplyHeader::decode(simple), Ok(ReplyHeader::Simple { error: 5, cookie: 9 }));
        let long = b"\x66\x8e\x33\xef\0\x01\0\x05\0\0\0\0\0\0\0\x09\0\0\0\x0c";
        let head = Chunk { flags: 1, kind: 5, cookie: 9, length: 12 };
        assert_eq!(ReplyHeader::decode(long), Ok(ReplyHeader::Chunk(head)));
        assert_eq!(ReplyHeader::decode(&long[..16]), Err(WireError::Short { what: "a reply" }));
        assert_eq!(ReplyHeader::decode(&[0; 16]), Err(WireError::Magic { what: "a reply", found: 0 }));
    }

    #[test]
    fn payloads_are_held_against_the_spec() {
        let run = |bytes, state| BlockRun { bytes, state };
        for (payload, want) in [
            (&b"\0\0\0\x01\0\0\x02\0\0\0\0\x03"[..], Ok((1, vec![run(512, 3)]))),
            (b"\0\0\0\x01\0\0\x02\0\0\0\0\x03\0", Err(WireError::Short { what: "block status" })),
            (b"\0\0\0\x01\0\0\0\0\0\0\0\x03", Err(WireError::NoBlocks)),
            (b"\0\0\0\x01", Err(WireError::NoBlocks)),
            (b"\0\0", Err(WireError::Short { what: "block status" })),
        ] {
            assert_eq!(decode_block_status(payload), want, "{payload:x?}");
        }
        for (kind, payload, want) in [
            (chunk::ERROR, &b"\0\0\0\x05\0\x02no"[..], Ok((5, "no".to_owned()))),
            (chunk::ERROR, b"\0\0\0\0\0\0", Err(WireError::NoError)),
            (chunk::ERROR, b"\0\0\0\x05\0\x03no", Err(WireError::Short { what: "an error" })),
            (chunk::ERROR, b"\0\0\0\x05\0\x01no", Err(WireError::Long { what: "an error", extra: 1 })),
            (chunk::ERROR, b"\0\0\0\x05\0\x01\xff", Err(WireError::NotText { what: "a name" })),
            (chunk::ERROR_OFFSET, b"\0\0\0\x05\0\0", Err(WireError::Short { what: "an error" })),
            (chunk::ERROR_OFFSET, b"\0\0\0\x1c\0\0\0\0\0\0\0\0\0\x01", Ok((28, String::new()))),
            (0x8123, b"\0\0\0\x05\0\0more", Ok((5, String::new()))),
        ] {
            assert_eq!(decode_error(kind, payload), want, "{payload:x?}");
        }
        assert_eq!(decode_hole(b"\0\0\0\0\0\0\x02\0\0\0\x10\0"), Ok((512, 4096)));
        assert_eq!(decode_hole(&[0; 13]), Err(WireError::Long { what: "a hole", extra: 1 }));
    }
}
