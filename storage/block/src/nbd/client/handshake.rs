//! The client's side of the negotiation.

use std::io::{Read, Write};

use super::super::error::PeerError;
use super::super::wire::{
    BlockSizes, ExportInfo, OLDSTYLE_MAGIC, OPTION_MAGIC, OPTION_MAX_BYTES, OptionReply, SERVER_MAGIC, WireError,
    client_options, decode_meta_context, decode_server_export, encode_info_request, encode_meta_request, encode_option,
    handshake_flag, info, option, reply,
};

/// Most messages in answer to one option.
const ANSWERS_MAX: usize = 10_000;

/// Of a server that has no options.
const TOO_OLD: &str = "the server is too old";

/// What client and server agreed on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    pub size_bytes: u64,
    /// Of [`super::super::wire::transmission_flag`].
    pub flags: u16,
    pub sizes: BlockSizes,
    pub structured: bool,
    /// Number of the context that was asked for.
    pub context: Option<u32>,
}

/// An export of a server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Export {
    /// Its name.
    pub name: String,
    /// What it is, for people; empty if nothing is said.
    pub description: String,
    /// Size in bytes and transmission flags, if the server tells before it is opened.
    pub size_and_flags: Option<(u64, u16)>,
    /// Sizes of requests that it wants.
    pub sizes: Option<BlockSizes>,
    /// Its metadata contexts.
    pub contexts: Vec<String>,
}

/// An answer and its data.
struct Answer {
    kind: u32,
    data: Vec<u8>,
}

/// One connection that haggles.
pub struct Haggle<S> {
    pub stream: S,
    /// The server answers options.
    has_options: bool,
    /// No zeroes follow when an export is named as of old.
    no_zeroes: bool,
}

/// Opens an export, with a metadata context if the server has it.
pub fn negotiate<S: Read + Write>(haggle: &mut Haggle<S>, export: &str, context: &str) -> Result<Agreed, PeerError> {
    if !haggle.has_options {
        return old_way(&mut haggle.stream, export, Agreed::default(), false);
    }
    let mut agreed = Agreed { structured: haggle.yes_or_no(option::STRUCTURED_REPLY, &[])?, ..Agreed::default() };
    if agreed.structured {
        let data = encode_meta_request(export, &[context]);
        let contexts = haggle.contexts(option::SET_META_CONTEXT, &data)?;
        agreed.context = contexts.into_iter().find(|(_, name)| name == context).map(|(id, _)| id);
    }
    let data = encode_info_request(export, &[info::BLOCK_SIZE]);
    match haggle.infos(option::GO, &data, export)? {
        Some(told) => {
            let (size_bytes, flags) = told.size_and_flags.ok_or(WireError::NoSize)?;
            let sizes = told.sizes.unwrap_or_default();
            checked(Agreed { size_bytes, flags, sizes, ..agreed })
        }
        None => {
            let no_zeroes = haggle.no_zeroes;
            old_way(&mut haggle.stream, export, agreed, no_zeroes)
        }
    }
}

/// Names the export as clients of old did: the answer is its size, or the end of the connection.
fn old_way<S: Read + Write>(
    stream: &mut S,
    export: &str,
    agreed: Agreed,
    no_zeroes: bool,
) -> Result<Agreed, PeerError> {
    let mut out = Vec::new();
    encode_option(&mut out, option::EXPORT_NAME, export.as_bytes());
    stream.write_all(&out)?;
    let mut head = [0; 10];
    stream.read_exact(&mut head).map_err(|error| match PeerError::from(error) {
        PeerError::Closed => PeerError::NoExport { export: export.to_owned() },
        other => other,
    })?;
    if !no_zeroes {
        stream.read_exact(&mut [0; 124])?;
    }
    let (size, flags) = head.split_first_chunk::<8>().ok_or(WireError::NoSize)?;
    let flags = flags.first_chunk::<2>().ok_or(WireError::NoSize)?;
    checked(Agreed { size_bytes: u64::from_be_bytes(*size), flags: u16::from_be_bytes(*flags), ..agreed })
}

fn checked(agreed: Agreed) -> Result<Agreed, PeerError> {
    match i64::try_from(agreed.size_bytes) {
        Ok(_) => Ok(agreed),
        Err(_) => Err(WireError::ExportTooLarge { bytes: agreed.size_bytes }.into()),
    }
}

/// Asks for all that a server has.
pub fn list<S: Read + Write>(haggle: &mut Haggle<S>) -> Result<Vec<Export>, PeerError> {
    let refused = |kind, text| PeerError::Refused { option: option::LIST, kind, text };
    if !haggle.has_options {
        return Err(refused(reply::ERR_UNSUP, TOO_OLD.to_owned()));
    }
    let mut exports = Vec::new();
    haggle.ask(option::LIST, &[])?;
    let end = haggle.answers(option::LIST, |answer| {
        let (name, description) = decode_server_export(&answer.data)?;
        exports.push(Export { name, description, ..Export::default() });
        Ok(answer.kind == reply::SERVER)
    })?;
    match end.kind {
        reply::ACK => {}
        reply::ERR_TLS_REQD => return Err(PeerError::TlsOnly),
        kind => return Err(refused(kind, text_of(&end.data))),
    }
    let structured = haggle.yes_or_no(option::STRUCTURED_REPLY, &[])?;
    for export in &mut exports {
        let data = encode_info_request(&export.name, &[info::BLOCK_SIZE, info::DESCRIPTION]);
        match haggle.infos(option::INFO, &data, &export.name) {
            Ok(Some(told)) => {
                export.size_and_flags = told.size_and_flags;
                export.sizes = told.sizes;
                if export.description.is_empty() {
                    export.description = told.description;
                }
            }
            Ok(None) | Err(PeerError::NoExport { .. } | PeerError::TlsOnly | PeerError::Refused { .. }) => {}
            Err(error) => return Err(error),
        }
        if structured {
            let data = encode_meta_request(&export.name, &[]);
            let contexts = haggle.contexts(option::LIST_META_CONTEXT, &data)?;
            export.contexts = contexts.into_iter().map(|(_, name)| name).collect();
        }
    }
    // The server may be gone before it has read this.
    let _ = haggle.ask(option::ABORT, &[]);
    Ok(exports)
}

fn text_of(data: &[u8]) -> String {
    let text = String::from_utf8_lossy(data).into_owned();
    if text.is_empty() { "no reason was given".to_owned() } else { text }
}

impl<S: Read + Write> Haggle<S> {
    /// The first exchange: the client's flags are sent when it is over.
    pub fn greet(mut stream: S) -> Result<Haggle<S>, PeerError> {
        let mut head = [0; 18];
        stream.read_exact(head.get_mut(..8).unwrap_or_default())?;
        let word = |at: usize, head: &[u8; 18]| {
            head.get(at..).and_then(|rest| rest.first_chunk::<8>()).map_or(0, |word| u64::from_be_bytes(*word))
        };
        if word(0, &head) != SERVER_MAGIC {
            return Err(WireError::NotNbd { found: word(0, &head) }.into());
        }
        stream.read_exact(head.get_mut(8..16).unwrap_or_default())?;
        match word(8, &head) {
            OPTION_MAGIC => {}
            OLDSTYLE_MAGIC => return Err(WireError::Oldstyle.into()),
            found => return Err(WireError::NotNbd { found }.into()),
        }
        let mut flags = [0; 2];
        stream.read_exact(&mut flags)?;
        let options = client_options(u16::from_be_bytes(flags));
        stream.write_all(&options.unwrap_or(0).to_be_bytes())?;
        let no_zeroes = options.is_some_and(|options| options & u32::from(handshake_flag::NO_ZEROES) != 0);
        Ok(Haggle { stream, has_options: options.is_some(), no_zeroes })
    }

    /// Asks for TLS: its handshake follows. Nothing may have been agreed on before.
    pub fn start_tls(&mut self) -> Result<(), PeerError> {
        if !self.has_options {
            return Err(PeerError::NoTls { text: TOO_OLD.to_owned() });
        }
        self.ask(option::STARTTLS, &[])?;
        let end = self.answers(option::STARTTLS, |_| Ok(false))?;
        match end.kind {
            reply::ACK => Ok(()),
            _ => Err(PeerError::NoTls { text: text_of(&end.data) }),
        }
    }

    fn ask(&mut self, number: u32, data: &[u8]) -> Result<(), PeerError> {
        let mut out = Vec::new();
        encode_option(&mut out, number, data);
        Ok(self.stream.write_all(&out)?)
    }

    fn answer(&mut self, asked: u32) -> Result<Answer, PeerError> {
        let mut head = [0; OptionReply::BYTES];
        self.stream.read_exact(&mut head)?;
        let OptionReply { option, kind, length } = OptionReply::decode(&head)?;
        if option != asked {
            return Err(WireError::OtherOption { asked, answered: option }.into());
        }
        if length > OPTION_MAX_BYTES {
            let (bytes, max) = (u64::from(length), u64::from(OPTION_MAX_BYTES));
            return Err(WireError::TooBig { what: "an answer to an option", bytes, max }.into());
        }
        let mut data = vec![0; length as usize];
        self.stream.read_exact(&mut data)?;
        Ok(Answer { kind, data })
    }

    /// Reads answers until one is final, and returns that. `each` says whether a kind belongs here.
    fn answers(
        &mut self,
        asked: u32,
        mut each: impl FnMut(Answer) -> Result<bool, PeerError>,
    ) -> Result<Answer, PeerError> {
        for _ in 0..ANSWERS_MAX {
            let answer = self.answer(asked)?;
            if answer.kind == reply::ACK || answer.kind & reply::ERROR != 0 {
                return Ok(answer);
            }
            let kind = answer.kind;
            if !each(answer)? {
                return Err(WireError::OtherReply { option: asked, kind }.into());
            }
        }
        Err(PeerError::TooManyAnswers { option: asked, max: ANSWERS_MAX })
    }

    /// An option that a server has or not.
    fn yes_or_no(&mut self, number: u32, data: &[u8]) -> Result<bool, PeerError> {
        self.ask(number, data)?;
        let end = self.answers(number, |_| Ok(false))?;
        match end.kind {
            reply::ERR_TLS_REQD => Err(PeerError::TlsOnly),
            kind => Ok(kind == reply::ACK),
        }
    }

    /// Metadata contexts; a server that has none may refuse.
    fn contexts(&mut self, number: u32, data: &[u8]) -> Result<Vec<(u32, String)>, PeerError> {
        let mut contexts = Vec::new();
        self.ask(number, data)?;
        let end = self.answers(number, |answer| {
            let belongs = answer.kind == reply::META_CONTEXT && contexts.len() < 64;
            if belongs {
                contexts.push(decode_meta_context(&answer.data)?);
            }
            Ok(belongs)
        })?;
        Ok(if end.kind == reply::ACK { contexts } else { Vec::new() })
    }

    /// `INFO` and `GO`. `None`: the server does not know the option.
    fn infos(&mut self, number: u32, data: &[u8], export: &str) -> Result<Option<Export>, PeerError> {
        let mut told = Export::default();
        self.ask(number, data)?;
        let end = self.answers(number, |answer| {
            if answer.kind != reply::INFO {
                return Ok(false);
            }
            match ExportInfo::decode(&answer.data)? {
                ExportInfo::Export { size_bytes, flags } => told.size_and_flags = Some((size_bytes, flags)),
                ExportInfo::BlockSize(sizes) => told.sizes = Some(sizes),
                ExportInfo::Description(text) => told.description = text,
                ExportInfo::Name(_) | ExportInfo::Unknown => {}
            }
            Ok(true)
        })?;
        match end.kind {
            reply::ACK => Ok(Some(told)),
            reply::ERR_UNSUP => Ok(None),
            reply::ERR_UNKNOWN => Err(PeerError::NoExport { export: export.to_owned() }),
            reply::ERR_TLS_REQD => Err(PeerError::TlsOnly),
            kind => Err(PeerError::Refused { option: number, kind, text: text_of(&end.data) }),
        }
    }
}
