//! Packets: a length word that counts itself, a header of six words, a payload.
//!
//! [`FrameReader`] turns an arbitrary chopping of the byte stream into frames and allocates nothing on the strength of a
//! length alone; [`write_frame`] builds one packet.

use crate::xdr::{Xdr, XdrError, from_bytes, xdr_struct};

/// Program number of the main protocol.
pub const REMOTE_PROGRAM: u32 = 0x2000_8086;
/// Program number of the QEMU extensions.
pub const QEMU_PROGRAM: u32 = 0x2000_8087;
/// Program number of the LXC extensions.
pub const LXC_PROGRAM: u32 = 0x0006_8000;
/// Program number of keepalive: type MESSAGE, serial 0, no payload.
pub const KEEPALIVE_PROGRAM: u32 = 0x6b65_6570;
/// Keepalive procedure that asks for a sign of life.
pub const KEEPALIVE_PING: u32 = 1;
/// Keepalive procedure that answers.
pub const KEEPALIVE_PONG: u32 = 2;
/// The only version of every program.
pub const PROGRAM_VERSION: u32 = 1;

/// Largest packet in bytes, the length word not counted (32 MiB).
pub const PACKET_MAX: usize = 32 << 20;
/// Most stream bytes in one packet that old clients accept.
pub const STREAM_CHUNK_MAX: usize = 262_120;
/// Most file descriptors one message may announce.
pub const FDS_MAX: u32 = 32;

const LENGTH_BYTES: usize = 4;
const HEADER_BYTES: usize = 24;

/// What kind of message a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MessageType {
    /// A client asks.
    Call = 0,
    /// The server answers a call.
    Reply = 1,
    /// An event or a keepalive.
    Message = 2,
    /// Data of a stream that a call opened.
    Stream = 3,
    /// A call that brings file descriptors.
    CallWithFds = 4,
    /// A reply that brings file descriptors.
    ReplyWithFds = 5,
    /// A hole in a sparse stream.
    StreamHole = 6,
}

/// Outcome word of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Status {
    /// Success, or the end of a stream.
    Ok = 0,
    /// The payload is an error body.
    Error = 1,
    /// More of the stream follows.
    Continue = 2,
}

/// The six header words. `serial` is the caller's; 0 is a legal serial of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the protocol's own names
pub struct Header {
    pub program: u32,
    pub version: u32,
    pub procedure: u32,
    pub kind: MessageType,
    pub serial: u32,
    pub status: Status,
}

impl Header {
    /// Header of the reply to `self`.
    pub fn reply(self, status: Status) -> Header {
        Header { kind: MessageType::Reply, status, ..self }
    }

    /// Header of a packet of the stream that the call `self` opened.
    pub fn stream(self, status: Status) -> Header {
        Header { kind: MessageType::Stream, status, ..self }
    }

    /// Header of an event.
    pub fn event(program: u32, procedure: u32) -> Header {
        let kind = MessageType::Message;
        Header { program, version: PROGRAM_VERSION, procedure, kind, serial: 0, status: Status::Ok }
    }

    /// Header of a call.
    pub fn call(program: u32, procedure: u32, serial: u32) -> Header {
        let kind = MessageType::Call;
        Header { program, version: PROGRAM_VERSION, procedure, kind, serial, status: Status::Ok }
    }

    /// Header of a keepalive message.
    pub fn keepalive(procedure: u32) -> Header {
        Header::event(KEEPALIVE_PROGRAM, procedure)
    }
}

xdr_struct! {
    /// The header as it lies on the wire, before its words are known to mean something.
    pub struct RawHeader { program: u32, version: u32, procedure: u32, kind: u32, serial: u32, status: u32 }
}

impl From<Header> for RawHeader {
    fn from(header: Header) -> RawHeader {
        let Header { program, version, procedure, kind, serial, status } = header;
        RawHeader { program, version, procedure, kind: kind as u32, serial, status: status as u32 }
    }
}

impl TryFrom<RawHeader> for Header {
    type Error = FrameError;
    fn try_from(raw: RawHeader) -> Result<Header, FrameError> {
        let kind = match raw.kind {
            0 => MessageType::Call,
            1 => MessageType::Reply,
            2 => MessageType::Message,
            3 => MessageType::Stream,
            4 => MessageType::CallWithFds,
            5 => MessageType::ReplyWithFds,
            6 => MessageType::StreamHole,
            found => return Err(FrameError::UnknownType { found }),
        };
        let status = match raw.status {
            0 => Status::Ok,
            1 => Status::Error,
            2 => Status::Continue,
            found => return Err(FrameError::UnknownStatus { found }),
        };
        let RawHeader { program, version, procedure, serial, .. } = raw;
        Ok(Header { program, version, procedure, kind, serial, status })
    }
}

/// A whole packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Its header.
    pub header: Header,
    /// File descriptors it announced; one byte each follows the packet, which the reader swallows.
    pub fd_count: u32,
    /// Everything after the header (and after the descriptor count).
    pub payload: Vec<u8>,
}

/// Why a byte stream is no longer a sequence of packets. The connection cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length word is impossible.
    #[error("packet length {found} is outside {min}..={max}")]
    Length {
        /// Length word.
        found: usize,
        /// Smallest legal value.
        min: usize,
        /// Largest legal value.
        max: usize,
    },
    /// The type word is unknown.
    #[error("unknown message type {found}")]
    UnknownType {
        /// Type word.
        found: u32,
    },
    /// The status word is unknown.
    #[error("unknown message status {found}")]
    UnknownStatus {
        /// Status word.
        found: u32,
    },
    /// More file descriptors than a message may bring.
    #[error("message announces {found} file descriptors, at most {FDS_MAX} are allowed")]
    TooManyFds {
        /// Announced count.
        found: u32,
    },
    /// The header is cut short.
    #[error("packet header: {0}")]
    Header(#[from] XdrError),
}

/// Collects bytes and hands out frames.
#[derive(Debug)]
pub struct FrameReader {
    buffer: Vec<u8>,
    start: usize,
    skip: usize,
    packet_max: usize,
}

impl Default for FrameReader {
    fn default() -> Self {
        FrameReader::new()
    }
}

impl FrameReader {
    /// A reader that takes packets up to [`PACKET_MAX`].
    pub fn new() -> FrameReader {
        FrameReader { buffer: Vec::new(), start: 0, skip: 0, packet_max: PACKET_MAX }
    }

    /// Changes the largest packet accepted from now on, in bytes without the length word (strangers get less).
    pub fn set_packet_max(&mut self, packet_max: usize) {
        self.packet_max = packet_max.min(PACKET_MAX);
    }

    /// Adds bytes as they came.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start == self.buffer.len() {
            self.buffer.clear();
            self.start = 0;
        } else if self.start > 0 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// Bytes held for packets that are not complete.
    pub fn pending_bytes(&self) -> usize {
        self.buffer.len() - self.start
    }

    /// Takes the next whole packet; `None` means more bytes are needed.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let skipped = self.skip.min(self.pending_bytes());
        self.start += skipped;
        self.skip -= skipped;
        let pending = self.buffer.get(self.start..).unwrap_or_default();
        let Some((length, rest)) = pending.split_first_chunk::<LENGTH_BYTES>() else {
            if pending.is_empty() {
                // An idle connection holds no memory.
                self.buffer = Vec::new();
                self.start = 0;
            }
            return Ok(None);
        };
        let found = u32::from_be_bytes(*length) as usize;
        let (min, max) = (LENGTH_BYTES + HEADER_BYTES, LENGTH_BYTES + self.packet_max);
        if !(min..=max).contains(&found) {
            return Err(FrameError::Length { found, min, max });
        }
        let Some(packet) = rest.get(..found - LENGTH_BYTES) else {
            return Ok(None);
        };
        let (header, body) = packet.split_at(HEADER_BYTES);
        let header = Header::try_from(from_bytes::<RawHeader>(header)?)?;
        let (fd_count, body) = split_fds(header, body)?;
        let frame = Frame { header, fd_count, payload: body.to_vec() };
        self.start += found;
        self.skip = fd_count as usize;
        Ok(Some(frame))
    }
}

/// Separates the descriptor count that messages with descriptors carry before their payload.
fn split_fds(header: Header, body: &[u8]) -> Result<(u32, &[u8]), FrameError> {
    if !matches!(header.kind, MessageType::CallWithFds | MessageType::ReplyWithFds) {
        return Ok((0, body));
    }
    let Some((count, body)) = body.split_first_chunk::<4>() else {
        return Err(FrameError::Header(XdrError::Short { missing: 4 - body.len().min(4) }));
    };
    let count = u32::from_be_bytes(*count);
    if count > FDS_MAX {
        return Err(FrameError::TooManyFds { found: count });
    }
    Ok((count, body))
}

/// Appends a packet whose payload `fill` writes.
pub fn write_frame(out: &mut Vec<u8>, header: Header, fill: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0; LENGTH_BYTES]);
    RawHeader::from(header).encode(out);
    fill(out);
    let length = (out.len() - start) as u32;
    if let Some(word) = out.get_mut(start..start + LENGTH_BYTES) {
        word.copy_from_slice(&length.to_be_bytes());
    }
}

/// A packet whose payload is one value.
pub fn frame_of<T: Xdr>(header: Header, payload: &T) -> Vec<u8> {
    let mut out = Vec::with_capacity(128);
    write_frame(&mut out, header, |out| payload.encode(out));
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xdr::XStr;

    fn sample() -> Vec<u8> {
        frame_of(Header::call(REMOTE_PROGRAM, 23, 7), &XStr::from("vm1"))
    }

    #[test]
    fn a_packet_has_the_documented_bytes() {
        let expected: &[u8] = &[
            0, 0, 0, 36, 0x20, 0, 0x80, 0x86, 0, 0, 0, 1, 0, 0, 0, 23, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 3,
            b'v', b'm', b'1', 0,
        ];
        assert_eq!(sample(), expected);
    }

    #[test]
    fn any_chopping_gives_the_same_frames() {
        let stream = [sample(), sample(), sample()].concat();
        for chunk in 1..stream.len() {
            let mut reader = FrameReader::new();
            let mut frames = Vec::new();
            for bytes in stream.chunks(chunk) {
                reader.push(bytes);
                while let Some(frame) = reader.next_frame().unwrap() {
                    frames.push(frame);
                }
            }
            assert_eq!(frames.len(), 3, "chunks of {chunk}");
            assert!(frames.iter().all(|frame| frame.header.procedure == 23 && frame.payload == b"\0\0\0\x03vm1\0"));
            assert_eq!(reader.pending_bytes(), 0);
        }
    }

    #[test]
    fn descriptor_bytes_after_a_packet_are_swallowed() {
        let mut header = Header::call(REMOTE_PROGRAM, 310, 1);
        header.kind = MessageType::CallWithFds;
        let mut bytes = frame_of(header, &2u32);
        bytes.extend_from_slice(b"xx");
        bytes.extend_from_slice(&sample());
        let mut reader = FrameReader::new();
        reader.push(&bytes);
        assert_eq!(reader.next_frame().unwrap().map(|frame| frame.fd_count), Some(2));
        assert_eq!(reader.next_frame().unwrap().map(|frame| frame.header.procedure), Some(23));
    }

    #[test]
    fn impossible_packets_end_the_stream() {
        let check = |change: fn(&mut Vec<u8>), expected: FrameError| {
            let mut bytes = sample();
            change(&mut bytes);
            let mut reader = FrameReader::new();
            reader.push(&bytes);
            assert_eq!(reader.next_frame(), Err(expected));
        };
        let max = PACKET_MAX + 4;
        check(|b| b[..4].copy_from_slice(&[0xff; 4]), FrameError::Length { found: 0xffff_ffff, min: 28, max });
        check(|b| b[3] = 27, FrameError::Length { found: 27, min: 28, max });
        check(|b| b[..4].copy_from_slice(&[2, 0, 0, 5]), FrameError::Length { found: PACKET_MAX + 5, min: 28, max });
        check(|b| b[19] = 7, FrameError::UnknownType { found: 7 });
        check(|b| b[27] = 3, FrameError::UnknownStatus { found: 3 });
        check(
            |b| {
                b[19] = 4;
                b[31] = 33;
            },
            FrameError::TooManyFds { found: 33 },
        );
    }

    #[test]
    fn random_bytes_never_panic() {
        let mut seed = 0x9e37_79b9_7f4a_7c15u64;
        for _ in 0..20_000 {
            let mut bytes = sample();
            for _ in 0..4 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let at = (seed >> 33) as usize % bytes.len();
                bytes[at] = (seed >> 24) as u8;
            }
            let mut reader = FrameReader::new();
            reader.push(&bytes);
            while let Ok(Some(_)) = reader.next_frame() {}
        }
    }
}
