//! Option haggling: what a client asks before it sends requests, and the answers. Spec, "Newstyle negotiation".

use super::{
    Fields, NAME_MAX_BYTES, OPTION_MAGIC, OPTION_REPLY_MAGIC, PAYLOAD_MAX_BYTES, QUERIES_MAX, WireError,
    transmission_flag,
};

/// Numbers of options.
#[allow(missing_docs, reason = "the spec's names")]
pub mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Kinds of answers to options. Errors have the highest bit set.
#[allow(missing_docs, reason = "the spec's names")]
pub mod reply {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERROR: u32 = 1 << 31;
    pub const ERR_UNSUP: u32 = ERROR | 1;
    pub const ERR_POLICY: u32 = ERROR | 2;
    pub const ERR_INVALID: u32 = ERROR | 3;
    pub const ERR_TLS_REQD: u32 = ERROR | 5;
    pub const ERR_UNKNOWN: u32 = ERROR | 6;
    pub const ERR_SHUTDOWN: u32 = ERROR | 7;
    pub const ERR_TOO_BIG: u32 = ERROR | 9;
}

/// What an answer to `INFO` or `GO` tells.
#[allow(missing_docs, reason = "the spec's names")]
pub mod info {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// An option as a server reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the spec's names")]
pub enum OptionRequest {
    ExportName(String),
    Abort,
    List,
    StartTls,
    Info { export: String, infos: Vec<u16> },
    Go { export: String, infos: Vec<u16> },
    StructuredReply,
    ListMeta { export: String, queries: Vec<String> },
    SetMeta { export: String, queries: Vec<String> },
    Unknown,
}

impl OptionRequest {
    /// Takes an option's data apart.
    pub fn decode(number: u32, data: &[u8]) -> Result<OptionRequest, WireError> {
        let mut fields = Fields::of("the option's data", data);
        let request = match number {
            option::EXPORT_NAME => {
                let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
                OptionRequest::ExportName(fields.text(length)?)
            }
            // Data of an abort is ignored, spec: "the server MUST handle".
            option::ABORT => return Ok(OptionRequest::Abort),
            option::LIST => OptionRequest::List,
            option::STARTTLS => OptionRequest::StartTls,
            option::INFO | option::GO => {
                let (export, infos) = decode_info(&mut fields)?;
                match number {
                    option::GO => OptionRequest::Go { export, infos },
                    _ => OptionRequest::Info { export, infos },
                }
            }
            option::STRUCTURED_REPLY => OptionRequest::StructuredReply,
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                let (export, queries) = decode_meta(&mut fields)?;
                match number {
                    option::SET_META_CONTEXT => OptionRequest::SetMeta { export, queries },
                    _ => OptionRequest::ListMeta { export, queries },
                }
            }
            _ => return Ok(OptionRequest::Unknown),
        };
        fields.end()?;
        Ok(request)
    }
}

fn decode_info(fields: &mut Fields<'_>) -> Result<(String, Vec<u16>), WireError> {
    let length = fields.u32()?;
    let export = fields.text(length)?;
    let count = fields.u16()?;
    let infos = (0..count).map(|_| fields.u16()).collect::<Result<Vec<u16>, WireError>>()?;
    Ok((export, infos))
}

fn decode_meta(fields: &mut Fields<'_>) -> Result<(String, Vec<String>), WireError> {
    let length = fields.u32()?;
    let export = fields.text(length)?;
    let count = fields.u32()?;
    if count as usize > QUERIES_MAX {
        return Err(WireError::TooBig {
            what: "the list of queries",
            bytes: u64::from(count),
            max: QUERIES_MAX as u64,
        });
    }
    let query = |fields: &mut Fields<'_>| {
        let length = fields.u32()?;
        fields.text(length)
    };
    let queries = (0..count).map(|_| query(fields)).collect::<Result<Vec<String>, WireError>>()?;
    Ok((export, queries))
}

/// Appends an option as a client sends it. `data` is shorter than [`super::OPTION_MAX_BYTES`].
pub fn encode_option(out: &mut Vec<u8>, number: u32, data: &[u8]) {
    out.extend(OPTION_MAGIC.to_be_bytes());
    out.extend(number.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u32).to_be_bytes());
    out.extend(text.as_bytes());
}

/// Data of `INFO` and `GO`.
pub fn encode_info_request(export: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = Vec::new();
    put_text(&mut data, export);
    data.extend((infos.len() as u16).to_be_bytes());
    infos.iter().for_each(|info| data.extend(info.to_be_bytes()));
    data
}

/// Data of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
pub fn encode_meta_request(export: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = Vec::new();
    put_text(&mut data, export);
    data.extend((queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|query| put_text(&mut data, query));
    data
}

/// Head of an answer to an option, as a client reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReply {
    /// What it answers.
    pub option: u32,
    /// What it is, of [`reply`].
    pub kind: u32,
    /// Bytes that follow.
    pub length: u32,
}

impl OptionReply {
    /// Its length.
    pub const BYTES: usize = 20;

    /// Takes it apart.
    pub fn decode(bytes: &[u8; OptionReply::BYTES]) -> Result<OptionReply, WireError> {
        let mut fields = Fields::of("an answer to an option", bytes);
        let magic = fields.u64()?;
        if magic != OPTION_REPLY_MAGIC {
            return Err(WireError::Magic { what: "an answer to an option", found: magic });
        }
        Ok(OptionReply { option: fields.u32()?, kind: fields.u32()?, length: fields.u32()? })
    }
}

fn answer(out: &mut Vec<u8>, number: u32, kind: u32, data: &[u8]) {
    out.extend(OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend(number.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
}

/// Sizes of requests that a server wants, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Requests start and end at multiples of it; a power of two, at most 64 KiB.
    pub min: u32,
    /// Smaller ones are slow; a power of two.
    pub preferred: u32,
    /// Largest payload.
    pub max: u32,
}

impl Default for BlockSizes {
    /// What holds where nothing was said.
    fn default() -> BlockSizes {
        BlockSizes { min: 1, preferred: 4096, max: PAYLOAD_MAX_BYTES }
    }
}

/// One piece of what `INFO` and `GO` tell.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the spec's names")]
pub enum ExportInfo {
    Export { size_bytes: u64, flags: u16 },
    Name(String),
    Description(String),
    BlockSize(BlockSizes),
    Unknown,
}

impl ExportInfo {
    /// Takes it apart.
    pub fn decode(data: &[u8]) -> Result<ExportInfo, WireError> {
        let mut fields = Fields::of("what the server tells about the export", data);
        let text = |fields: &mut Fields<'_>| {
            let rest = fields.rest();
            Fields::of("what the server tells about the export", rest).text(rest.len() as u32)
        };
        let told = match fields.u16()? {
            info::EXPORT => ExportInfo::Export { size_bytes: fields.u64()?, flags: fields.u16()? },
            info::NAME => ExportInfo::Name(text(&mut fields)?),
            info::DESCRIPTION => ExportInfo::Description(text(&mut fields)?),
            info::BLOCK_SIZE => {
                let (min, preferred, max) = (fields.u32()?, fields.u32()?, fields.u32()?);
                let sane = min.is_power_of_two()
                    && min <= 64 << 10
                    && preferred.is_power_of_two()
                    && preferred >= min
                    && max >= preferred;
                if !sane {
                    return Err(WireError::BlockSizes { min, preferred, max });
                }
                ExportInfo::BlockSize(BlockSizes { min, preferred, max })
            }
            _ => return Ok(ExportInfo::Unknown),
        };
        fields.end()?;
        Ok(told)
    }
}

/// Name and description of an export in the answer to `LIST`.
pub fn decode_server_export(data: &[u8]) -> Result<(String, String), WireError> {
    let mut fields = Fields::of("an export in the list", data);
    let length = fields.u32()?;
    let name = fields.text(length)?;
    let rest = fields.rest();
    let length = u32::try_from(rest.len()).unwrap_or(u32::MAX);
    Ok((name, Fields::of("an export in the list", rest).text(length)?))
}

/// Number and name of a metadata context.
pub fn decode_meta_context(data: &[u8]) -> Result<(u32, String), WireError> {
    let mut fields = Fields::of("a metadata context", data);
    let id = fields.u32()?;
    let rest = fields.rest();
    let length = u32::try_from(rest.len()).unwrap_or(u32::MAX);
    Ok((id, Fields::of("a metadata context", rest).text(length)?))
}

/// What a server has to offer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Name of the export.
    pub name: String,
    /// What it is, for people.
    pub description: String,
    /// Its size.
    pub size_bytes: u64,
    /// Its transmission flags, apart from what depends on structured replies.
    pub flags: u16,
    /// Names of the metadata contexts there are: the first one goes under number 1.
    pub contexts: Vec<String>,
    /// Clients have to begin with TLS. Spec, "TLS versions", mode FORCEDTLS; otherwise NOTLS.
    pub tls: bool,
}

/// What to do after an option was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Read the next option.
    Continue,
    /// Requests follow.
    Transmit,
    /// The handshake of TLS follows, and then the next option.
    StartTls,
    /// Close the connection.
    Close,
}

/// The server's side of option haggling: options in, answers out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Negotiation {
    /// The client asked for no zeroes behind the old way of naming an export.
    pub no_zeroes: bool,
    /// TLS has begun.
    pub encrypted: bool,
    /// Structured replies were agreed on.
    pub structured: bool,
    /// Numbers of the metadata contexts that block status is given for.
    pub contexts: Vec<u32>,
}

impl Negotiation {
    /// After the client's flags. A client that is not fixed newstyle may only name its export.
    pub fn start(client_flags: u32) -> Result<Negotiation, WireError> {
        let known = u32::from(super::handshake_flag::FIXED_NEWSTYLE | super::handshake_flag::NO_ZEROES);
        if client_flags & !known != 0 {
            return Err(WireError::HandshakeFlags { found: client_flags });
        }
        let no_zeroes = client_flags & u32::from(super::handshake_flag::NO_ZEROES) != 0;
        Ok(Negotiation { no_zeroes, ..Negotiation::default() })
    }

    /// Answers an option that was too large to be read.
    pub fn refuse_size(number: u32, out: &mut Vec<u8>) -> Verdict {
        if number == option::EXPORT_NAME {
            return Verdict::Close;
        }
        answer(out, number, reply::ERR_TOO_BIG, b"the option is too large");
        Verdict::Continue
    }

    /// Answers one option.
    pub fn answer(&mut self, offer: &Offer, number: u32, data: &[u8], out: &mut Vec<u8>) -> Verdict {
        let request = match OptionRequest::decode(number, data) {
            Ok(request) => request,
            // The old way of naming an export has no answer that says no.
            Err(_) if number == option::EXPORT_NAME => return Verdict::Close,
            Err(error) => {
                answer(out, number, reply::ERR_INVALID, error.to_string().as_bytes());
                return Verdict::Continue;
            }
        };
        if offer.tls && !self.encrypted && !matches!(request, OptionRequest::StartTls | OptionRequest::Abort) {
            if number == option::EXPORT_NAME {
                return Verdict::Close;
            }
            answer(out, number, reply::ERR_TLS_REQD, b"the server demands TLS first");
            return Verdict::Continue;
        }
        let unknown = |out: &mut Vec<u8>| answer(out, number, reply::ERR_UNKNOWN, b"no export has this name");
        match request {
            OptionRequest::ExportName(name) if name == offer.name => {
                self.old_way(offer, out);
                return Verdict::Transmit;
            }
            OptionRequest::ExportName(_) => return Verdict::Close,
            OptionRequest::Abort => {
                answer(out, number, reply::ACK, &[]);
                return Verdict::Close;
            }
            OptionRequest::List => {
                let mut data = Vec::new();
                put_text(&mut data, &offer.name);
                data.extend(offer.description.as_bytes());
                answer(out, number, reply::SERVER, &data);
                answer(out, number, reply::ACK, &[]);
            }
            OptionRequest::StartTls => return self.start_tls(offer, number, out),
            OptionRequest::Info { export, .. } | OptionRequest::Go { export, .. } if export != offer.name => {
                unknown(out)
            }
            OptionRequest::Info { infos, .. } => self.inform(offer, number, &infos, out),
            OptionRequest::Go { infos, .. } => {
                self.inform(offer, number, &infos, out);
                return Verdict::Transmit;
            }
            OptionRequest::StructuredReply => {
                self.structured = true;
                answer(out, number, reply::ACK, &[]);
            }
            OptionRequest::ListMeta { .. } | OptionRequest::SetMeta { .. } if !self.structured => {
                answer(out, number, reply::ERR_INVALID, b"structured replies were not negotiated");
            }
            OptionRequest::ListMeta { export, .. } | OptionRequest::SetMeta { export, .. } if export != offer.name => {
                unknown(out);
            }
            OptionRequest::ListMeta { queries, .. } => {
                let asked = offer.contexts.iter().filter(|name| is_asked_for(name, &queries));
                asked.for_each(|name| Self::name_context(number, 0, name, out));
                answer(out, number, reply::ACK, &[]);
            }
            OptionRequest::SetMeta { queries, .. } => self.choose_contexts(offer, number, &queries, out),
            OptionRequest::Unknown => answer(out, number, reply::ERR_UNSUP, b"the option is not supported"),
        }
        Verdict::Continue
    }

    fn start_tls(&mut self, offer: &Offer, number: u32, out: &mut Vec<u8>) -> Verdict {
        if self.encrypted {
            answer(out, number, reply::ERR_INVALID, b"TLS has begun");
            return Verdict::Continue;
        }
        if !offer.tls {
            answer(out, number, reply::ERR_POLICY, b"TLS is not configured");
            return Verdict::Continue;
        }
        answer(out, number, reply::ACK, &[]);
        // Whatever was agreed on in the clear may be somebody else's wish.
        *self = Negotiation { no_zeroes: self.no_zeroes, encrypted: true, ..Negotiation::default() };
        Verdict::StartTls
    }

    /// Each call replaces what an earlier one chose.
    fn choose_contexts(&mut self, offer: &Offer, number: u32, queries: &[String], out: &mut Vec<u8>) {
        self.contexts.clear();
        for (id, name) in (1..).zip(&offer.contexts) {
            if queries.contains(name) {
                self.contexts.push(id);
                Self::name_context(number, id, name, out);
            }
        }
        answer(out, number, reply::ACK, &[]);
    }

    fn name_context(number: u32, id: u32, name: &str, out: &mut Vec<u8>) {
        let mut data = id.to_be_bytes().to_vec();
        data.extend(name.as_bytes());
        answer(out, number, reply::META_CONTEXT, &data);
    }

    fn flags(&self, offer: &Offer) -> u16 {
        offer.flags | if self.structured { transmission_flag::SEND_DF } else { 0 }
    }

    /// Size and flags without a head, and zeroes that clients of old expect.
    fn old_way(&self, offer: &Offer, out: &mut Vec<u8>) {
        out.extend(offer.size_bytes.to_be_bytes());
        out.extend(self.flags(offer).to_be_bytes());
        if !self.no_zeroes {
            out.extend([0; 124]);
        }
    }

    fn inform(&self, offer: &Offer, number: u32, infos: &[u16], out: &mut Vec<u8>) {
        let mut tell = |kind: u16, data: &[u8]| {
            let data = [&kind.to_be_bytes(), data].concat();
            answer(out, number, reply::INFO, &data);
        };
        if infos.contains(&info::NAME) {
            tell(info::NAME, offer.name.as_bytes());
        }
        if infos.contains(&info::DESCRIPTION) && !offer.description.is_empty() {
            tell(info::DESCRIPTION, offer.description.as_bytes());
        }
        if infos.contains(&info::BLOCK_SIZE) {
            let BlockSizes { min, preferred, max } = BlockSizes::default();
            tell(info::BLOCK_SIZE, &[min, preferred, max].map(u32::to_be_bytes).concat());
        }
        let flags = self.flags(offer).to_be_bytes();
        tell(info::EXPORT, &[&offer.size_bytes.to_be_bytes()[..], &flags].concat());
        answer(out, number, reply::ACK, &[]);
    }
}

/// Whether queries for a list mean a context: one that ends with a colon asks for all that begin so, none for all.
fn is_asked_for(name: &str, queries: &[String]) -> bool {
    let asks = |query: &String| query == name || query.ends_with(':') && name.starts_with(query);
    queries.is_empty() || queries.iter().any(asks)
}

/// The client's flags in answer to the server's; `None`: the server is too old to haggle over options.
pub fn client_options(server_flags: u16) -> Option<u32> {
    let ours = super::handshake_flag::FIXED_NEWSTYLE | super::handshake_flag::NO_ZEROES;
    let fixed = server_flags & super::handshake_flag::FIXED_NEWSTYLE != 0;
    fixed.then_some(u32::from(server_flags & ours))
}

const _: () = assert!(NAME_MAX_BYTES < super::OPTION_MAX_BYTES as usize);

#[cfg(test)]
mod tests {
    use super::super::BASE_ALLOCATION;
    use super::*;

    fn offer() -> Offer {
        let (name, description) = ("disk".to_owned(), "a disk".to_owned());
        let contexts = vec![BASE_ALLOCATION.to_owned()];
        Offer { name, description, size_bytes: 0x10000, flags: 0x0005, contexts, tls: false }
    }

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        digits.chunks(2).map(byte).collect()
    }

    /// Options with their data, and what is answered, both in hexadecimal as the spec lays them out.
    #[test]
    fn options_are_answered_as_the_spec_says() {
        const HEAD: &str = "0003e889045565a9";
        let disk = "00000004 6469736b";
        let other = "00000001 78";
        type Answers<'a> = &'a [(u32, &'a str)];
        let cases: &[(u32, String, Answers<'_>, Verdict)] = &[
            (3, String::new(), &[(2, "00000004 6469736b 61206469736b"), (1, "")], Verdict::Continue),
            (5, String::new(), &[(0x8000_0002, "*")], Verdict::Continue),
            (2, "00".into(), &[(1, "")], Verdict::Close),
            (8, String::new(), &[(1, "")], Verdict::Continue),
            (8, "00".into(), &[(0x8000_0003, "*")], Verdict::Continue),
            (
                10,
                format!("{disk} 00000001 0000000f 626173653a616c6c6f636174696f6e"),
                &[(4, "00000001 626173653a616c6c6f636174696f6e"), (1, "")],
                Verdict::Continue,
            ),
            (10, format!("{disk} 00000001 00000005 71656d753a"), &[(1, "")], Verdict::Continue),
            (10, format!("{other} 00000000"), &[(0x8000_0006, "*")], Verdict::Continue),
            (
                9,
                format!("{disk} 00000000"),
                &[(4, "00000000 626173653a616c6c6f636174696f6e"), (1, "")],
                Verdict::Continue,
            ),
            (
                9,
                format!("{disk} 00000001 00000005 626173653a"),
                &[(4, "00000000 626173653a616c6c6f636174696f6e"), (1, "")],
                Verdict::Continue,
            ),
            (9, format!("{disk} 00000001 00000005 71656d753a"), &[(1, "")], Verdict::Continue),
            (9, format!("{disk} 00000021"), &[(0x8000_0003, "*")], Verdict::Continue),
            (9, format!("{disk} ffffffff"), &[(0x8000_0003, "*")], Verdict::Continue),
            (
                6,
                format!("{disk} 0002 0002 0003"),
                &[
                    (3, "0002 61206469736b"),
                    (3, "0003 00000001 00001000 02000000"),
                    (3, "0000 0000000000010000 0085"),
                    (1, ""),
                ],
                Verdict::Continue,
            ),
            (6, format!("{disk} 0002 0002"), &[(0x8000_0003, "*")], Verdict::Continue),
            (6, format!("{disk} 0000 00"), &[(0x8000_0003, "*")], Verdict::Continue),
            (6, "000000ff 00".into(), &[(0x8000_0003, "*")], Verdict::Continue),
            (6, "ffffffff".into(), &[(0x8000_0003, "*")], Verdict::Continue),
            (6, "00000002 fffe 0000".into(), &[(0x8000_0003, "*")], Verdict::Continue),
            (6, format!("{other} 0000"), &[(0x8000_0006, "*")], Verdict::Continue),
            (7, format!("{other} 0000"), &[(0x8000_0006, "*")], Verdict::Continue),
            (7, format!("{disk} 0000"), &[(3, "0000 0000000000010000 0085"), (1, "")], Verdict::Transmit),
            (11, String::new(), &[(0x8000_0001, "*")], Verdict::Continue),
            (0xffff_ffff, "0011".into(), &[(0x8000_0001, "*")], Verdict::Continue),
            (1, "78".into(), &[], Verdict::Close),
            (1, "fe".into(), &[], Verdict::Close),
        ];
        let mut negotiation = Negotiation::start(3).unwrap();
        for (number, data, want, verdict) in cases {
            let mut out = Vec::new();
            let got = negotiation.answer(&offer(), *number, &hex(data), &mut out);
            assert_eq!(got, *verdict, "option {number}: {data}");
            let mut left = &out[..];
            for (kind, payload) in *want {
                let head = hex(&format!("{HEAD} {number:08x} {kind:08x}"));
                assert_eq!(left[..16], head, "option {number}: {data}");
                let length = u32::from_be_bytes(left[16..20].try_into().unwrap()) as usize;
                if *payload != "*" {
                    assert_eq!(left[20..20 + length], hex(payload), "option {number}: {data}");
                }
                left = &left[20 + length..];
            }
            assert!(left.is_empty(), "option {number}: {data}");
        }
    }

    #[test]
    fn the_old_way_of_naming_an_export() {
        for (flags, bytes) in [(0, 134), (1, 134), (2, 10), (3, 10)] {
            let mut out = Vec::new();
            let mut negotiation = Negotiation::start(flags).unwrap();
            assert_eq!(negotiation.answer(&offer(), 1, b"disk", &mut out), Verdict::Transmit);
            assert_eq!(out.len(), bytes);
            assert_eq!(out[..10], hex("0000000000010000 0005"));
        }
        assert_eq!(Negotiation::start(4), Err(WireError::HandshakeFlags { found: 4 }));
    }

    /// Spec, "TLS support": in FORCEDTLS nothing but STARTTLS and ABORT is answered in the clear, and what was agreed on
    /// before is forgotten.
    #[test]
    fn a_server_that_demands_tls_says_nothing_before() {
        let offer = Offer { tls: true, ..offer() };
        let mut negotiation = Negotiation { structured: true, contexts: vec![1], ..Negotiation::start(3).unwrap() };
        let mut ask = |number: u32, data: &[u8]| {
            let mut out = Vec::new();
            let verdict = negotiation.answer(&offer, number, data, &mut out);
            let kind = out.get(12..16).map_or(0, |kind| u32::from_be_bytes(kind.try_into().unwrap()));
            (kind, verdict)
        };
        let go = encode_info_request("disk", &[]);
        for number in [option::LIST, option::STRUCTURED_REPLY] {
            assert_eq!(ask(number, &[]), (reply::ERR_TLS_REQD, Verdict::Continue), "{number}");
        }
        assert_eq!(ask(option::GO, &go), (reply::ERR_TLS_REQD, Verdict::Continue));
        assert_eq!(ask(option::EXPORT_NAME, b"disk"), (0, Verdict::Close));
        assert_eq!(ask(option::STARTTLS, b"x"), (reply::ERR_INVALID, Verdict::Continue));
        assert_eq!(ask(option::ABORT, &[]), (reply::ACK, Verdict::Close));
        assert_eq!(ask(option::STARTTLS, &[]), (reply::ACK, Verdict::StartTls));
        assert_eq!(ask(option::STARTTLS, &[]), (reply::ERR_INVALID, Verdict::Continue));
        assert_eq!(ask(option::GO, &go), (reply::INFO, Verdict::Transmit));
        let want = Negotiation { no_zeroes: true, encrypted: true, ..Negotiation::default() };
        assert_eq!(negotiation, want);
    }

    #[test]
    fn contexts_need_structured_replies() {
        let mut out = Vec::new();
        let data = encode_meta_request("disk", &[BASE_ALLOCATION]);
        let mut negotiation = Negotiation::start(3).unwrap();
        negotiation.answer(&offer(), option::SET_META_CONTEXT, &data, &mut out);
        assert_eq!((out[12..16].to_vec(), negotiation.contexts), (hex("80000003"), vec![]));
    }

    #[test]
    fn contexts_are_chosen_by_name_and_listed_by_what_they_begin_with() {
        let contexts = [BASE_ALLOCATION, "qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b"].map(str::to_owned).to_vec();
        let offer = Offer { contexts, ..offer() };
        for (option, queries, want) in [
            (option::LIST_META_CONTEXT, vec![], vec![0, 0, 0]),
            (option::LIST_META_CONTEXT, vec!["qemu:"], vec![0, 0]),
            (option::LIST_META_CONTEXT, vec!["qemu:dirty-bitmap:", "base:"], vec![0, 0, 0]),
            (option::LIST_META_CONTEXT, vec!["qemu:dirty-bitmap:a", "other:"], vec![0]),
            (option::SET_META_CONTEXT, vec!["qemu:dirty-bitmap:b", BASE_ALLOCATION], vec![1, 3]),
            (option::SET_META_CONTEXT, vec!["qemu:dirty-bitmap:"], vec![]),
            (option::SET_META_CONTEXT, vec![], vec![]),
        ] {
            let mut negotiation = Negotiation { structured: true, contexts: vec![2], ..Negotiation::default() };
            let mut out = Vec::new();
            negotiation.answer(&offer, option, &encode_meta_request("disk", &queries), &mut out);
            let mut ids = Vec::new();
            let mut left = &out[..];
            while let Some((head, rest)) = left.split_at_checked(OptionReply::BYTES) {
                let head = OptionReply::decode(head.try_into().unwrap()).unwrap();
                let (data, rest) = rest.split_at(head.length as usize);
                if head.kind == reply::META_CONTEXT {
                    ids.push(decode_meta_context(data).unwrap().0);
                }
                left = rest;
            }
            assert_eq!(ids, want, "{queries:?}");
            if option == option::SET_META_CONTEXT {
                assert_eq!(negotiation.contexts, want, "{queries:?}");
            }
        }
    }

    #[test]
    fn what_a_server_tells_is_held_against_the_spec() {
        let sizes = |min, preferred, max| Err(WireError::BlockSizes { min, preferred, max });
        let what = "what the server tells about the export";
        for (data, want) in [
            ("0000 0000000000000200 0003", Ok(ExportInfo::Export { size_bytes: 512, flags: 3 })),
            ("0000 0000000000000200 00", Err(WireError::Short { what })),
            ("0000 0000000000000200 0003 00", Err(WireError::Long { what, extra: 1 })),
            ("0001 61", Ok(ExportInfo::Name("a".into()))),
            ("0002", Ok(ExportInfo::Description(String::new()))),
            ("0002 ff", Err(WireError::NotText { what: "a name" })),
            (
                "0003 00000200 00001000 02000000",
                Ok(ExportInfo::BlockSize(BlockSizes { min: 512, preferred: 4096, max: 32 << 20 })),
            ),
            ("0003 00000000 00001000 02000000", sizes(0, 4096, 32 << 20)),
            ("0003 00020000 00020000 02000000", sizes(128 << 10, 128 << 10, 32 << 20)),
            ("0003 00001000 00000200 02000000", sizes(4096, 512, 32 << 20)),
            ("0003 00000200 00001000 00000200", sizes(512, 4096, 512)),
            ("0009 1234", Ok(ExportInfo::Unknown)),
            ("00", Err(WireError::Short { what })),
        ] {
            assert_eq!(ExportInfo::decode(&hex(data)), want, "{data}");
        }
    }
}
