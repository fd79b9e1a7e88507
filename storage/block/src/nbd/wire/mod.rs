//! The NBD protocol as bytes: pure functions, for both sides. "Spec" is the NBD project's `doc/proto.md`.
//!
//! Whatever a peer sends is decoded by length-checked reads into owned values, or refused as a [`WireError`]; sizes
//! that it names are held against the limits here before anything is allocated.

mod options;
mod transmission;

use thiserror::Error;

pub use options::{
    BlockSizes, ExportInfo, Negotiation, Offer, OptionReply, OptionRequest, Verdict, client_options,
    decode_meta_context, decode_server_export, encode_info_request, encode_meta_request, encode_option, info, option,
    reply,
};
pub use transmission::{
    BlockRun, Chunk, ReplyHeader, Request, chunk, command, command_flag, decode_block_status, decode_error,
    decode_hole, decode_offset, encode_block_status, encode_chunk, encode_error, encode_simple, transmission_flag,
};

/// First words of a server.
pub const SERVER_MAGIC: u64 = 0x4e42_444d_4147_4943; // "NBDMAGIC"
/// Second word of a newstyle server, and first of every option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // "IHAVEOPT"
/// First word of every answer to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Second word of an oldstyle server, which is not spoken.
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// First word of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First word of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First word of a structured reply's chunk.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Largest payload of a read or write, in bytes: what every implementation takes.
pub const PAYLOAD_MAX_BYTES: u32 = 32 << 20;
/// Longest name or text, in bytes. Spec, "Values".
pub const NAME_MAX_BYTES: usize = 4096;
/// Most bytes of an option or of an answer to one that are kept: a name and queries fit several times.
pub const OPTION_MAX_BYTES: u32 = 64 << 10;
/// Most queries for metadata contexts in one option.
pub const QUERIES_MAX: usize = 32;
/// The metadata context that tells holes from data.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// The metadata context that tells how many images down data is: 1 is the top one, 0 is none of them.
pub const ALLOCATION_DEPTH: &str = "qemu:allocation-depth";
/// What the names of metadata contexts begin with that tell what a bitmap marks; the bitmap's name follows.
pub const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";
/// `qemu:dirty-bitmap:`: the run is marked.
pub const STATE_DIRTY: u32 = 1;
/// `base:allocation`: the run takes no space.
pub const STATE_HOLE: u32 = 1;
/// `base:allocation`: the run reads as zeroes.
pub const STATE_ZERO: u32 = 2;

/// Flags of the first exchange. The client's have the same bits.
pub mod handshake_flag {
    /// Options are answered one by one.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// No 124 zeroes behind the old way of naming an export.
    pub const NO_ZEROES: u16 = 2;
}

/// Why bytes of a peer are refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[allow(missing_docs, reason = "the fields are named in the messages right above them")]
pub enum WireError {
    #[error("it does not speak NBD: it began with {found:#x}")]
    NotNbd { found: u64 },
    #[error("it speaks the oldstyle protocol, which is not supported; use a server with newstyle negotiation")]
    Oldstyle,
    #[error("unknown flags {found:#x} in the handshake")]
    HandshakeFlags { found: u32 },
    #[error("{what} begins with {found:#x}, which is no magic number")]
    Magic { what: &'static str, found: u64 },
    #[error("{what} ends too early")]
    Short { what: &'static str },
    #[error("{what} has {extra} bytes too many")]
    Long { what: &'static str, extra: usize },
    #[error("{what} has {bytes} bytes; at most {max} are taken")]
    TooBig { what: &'static str, bytes: u64, max: u64 },
    #[error("{what} is not UTF-8 text")]
    NotText { what: &'static str },
    #[error("an answer to option {answered} came where option {asked} was asked")]
    OtherOption { asked: u32, answered: u32 },
    #[error("an answer of kind {kind:#x} does not belong to option {option}")]
    OtherReply { option: u32, kind: u32 },
    #[error("the server did not say how large the export is")]
    NoSize,
    #[error("an export of {bytes} bytes is too large")]
    ExportTooLarge { bytes: u64 },
    #[error("block sizes {min}, {preferred} and {max} contradict each other")]
    BlockSizes { min: u32, preferred: u32, max: u32 },
    #[error("a reply carries cookie {cookie}, which no request has")]
    Cookie { cookie: u64 },
    #[error("a simple reply came for a read, where structured replies were agreed on")]
    SimpleRead,
    #[error("a structured reply came, which was not agreed on")]
    Structured,
    #[error("a chunk of kind {kind} does not belong to the request")]
    ChunkKind { kind: u16 },
    #[error("a chunk covers {bytes} bytes at {offset}, which the request did not ask for or has already")]
    ChunkRange { offset: u64, bytes: u64 },
    #[error("a reply is made of more than {max} pieces")]
    TooManyPieces { max: usize },
    #[error("a reply ended with {missing} bytes missing")]
    Incomplete { missing: u64 },
    #[error("a reply about blocks describes nothing")]
    NoBlocks,
    #[error("block status came for context {found}, not for {want}")]
    Context { found: u32, want: u32 },
    #[error("an error reply carries no error")]
    NoError,
}

/// Reads big-endian numbers off the front of a message.
pub(crate) struct Fields<'a> {
    bytes: &'a [u8],
    what: &'static str,
}

impl<'a> Fields<'a> {
    pub(crate) fn of(what: &'static str, bytes: &'a [u8]) -> Fields<'a> {
        Fields { bytes, what }
    }

    pub(crate) fn take(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        let (taken, rest) = self.bytes.split_at_checked(count).ok_or(WireError::Short { what: self.what })?;
        self.bytes = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (taken, rest) = self.bytes.split_first_chunk::<N>().ok_or(WireError::Short { what: self.what })?;
        self.bytes = rest;
        Ok(*taken)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_be_bytes)
    }

    /// Text of a length that the peer named.
    pub(crate) fn text(&mut self, length: u32) -> Result<String, WireError> {
        let (bytes, max) = (u64::from(length), NAME_MAX_BYTES as u64);
        if bytes > max {
            return Err(WireError::TooBig { what: "a name", bytes, max });
        }
        let text = self.take(length as usize)?;
        std::str::from_utf8(text).map(str::to_owned).map_err(|_| WireError::NotText { what: "a name" })
    }

    pub(crate) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.bytes)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(crate) fn end(&self) -> Result<(), WireError> {
        match self.bytes.len() {
            0 => Ok(()),
            extra => Err(WireError::Long { what: self.what, extra }),
        }
    }
}
