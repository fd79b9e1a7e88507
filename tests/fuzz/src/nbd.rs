//! The bytes of NBD as either side reads them.

use block::nbd::wire::{
    self, BlockRun, Chunk, ExportInfo, Negotiation, Offer, OptionReply, OptionRequest, ReplyHeader, Request, Verdict,
    WireError,
};

/// Options that a client may send, the request codes behind them, and everything that a server may answer.
pub fn nbd(data: &[u8]) -> bool {
    let Some((first, rest)) = data.split_first() else { return false };
    match first % 3 {
        0 => haggle(rest),
        1 => requests(rest),
        _ => answers(rest),
    }
}

/// A client haggles with our server: a number, a length, data, again and again.
fn haggle(data: &[u8]) -> bool {
    let offer = Offer {
        name: "disk".into(),
        description: "a disk".into(),
        size_bytes: 1 << 20,
        flags: wire::transmission_flag::HAS_FLAGS,
        contexts: vec!["base:allocation".to_owned(), "qemu:dirty-bitmap:b".to_owned()],
        tls: data.len() % 4 == 3,
    };
    let Some((flags, mut rest)) = data.split_first_chunk::<4>() else { return false };
    let Ok(mut state) = Negotiation::start(u32::from_be_bytes(*flags)) else { return false };
    let mut out = Vec::new();
    while let Some(([_, _, _, number, _, high, low, _], tail)) = rest.split_first_chunk::<8>() {
        let length = usize::from(u16::from_be_bytes([*high, *low])).min(tail.len());
        let (body, more) = tail.split_at(length);
        out.clear();
        let verdict = state.answer(&offer, u32::from(*number), body, &mut out);
        heads(&out, verdict, u32::from(*number));
        if !matches!(verdict, Verdict::Continue | Verdict::StartTls) {
            return verdict == Verdict::Transmit;
        }
        rest = more;
    }
    Negotiation::refuse_size(1, &mut out) == Verdict::Continue
}

/// What the server answers is what a client can read.
fn heads(out: &[u8], verdict: Verdict, number: u32) {
    // The old way of naming an export is answered without a head.
    if number == wire::option::EXPORT_NAME {
        return;
    }
    let mut rest = out;
    while let Some((head, tail)) = rest.split_first_chunk::<{ OptionReply::BYTES }>() {
        let head = OptionReply::decode(head).unwrap_or_else(|e| panic!("our answer cannot be read: {e}"));
        assert_eq!(head.option, number);
        let length = head.length as usize;
        assert!(length <= tail.len(), "an answer of {length} bytes is cut off");
        let (body, more) = tail.split_at(length);
        let read = match head.kind {
            wire::reply::INFO => ExportInfo::decode(body).map(|_| ()),
            wire::reply::SERVER => wire::decode_server_export(body).map(|_| ()),
            wire::reply::META_CONTEXT => wire::decode_meta_context(body).map(|_| ()),
            _ => Ok(()),
        };
        read.unwrap_or_else(|e| panic!("our answer of kind {:#x} cannot be read: {e}", head.kind));
        rest = more;
    }
    assert!(rest.is_empty() && (verdict == Verdict::Close || !out.is_empty()));
}

/// What a client sends when it has an export.
fn requests(data: &[u8]) -> bool {
    let mut taken = false;
    for bytes in data.windows(Request::BYTES).filter_map(|window| window.first_chunk()) {
        if let Ok(request) = Request::decode(bytes) {
            let mut out = Vec::new();
            request.encode(&mut out);
            assert_eq!(out, bytes);
            taken = true;
        }
    }
    for number in 0..12 {
        taken |= OptionRequest::decode(number, data).is_ok_and(|request| request != OptionRequest::Unknown);
    }
    taken
}

/// What a server sends: heads, and the payloads of chunks. What is taken is written as it was.
fn answers(data: &[u8]) -> bool {
    let _ = (ExportInfo::decode(data), wire::decode_server_export(data), wire::decode_meta_context(data));
    let _ = data.first_chunk().map(OptionReply::decode);
    let _ = data.first_chunk().map(|flags| wire::client_options(u16::from_be_bytes(*flags)));
    let _ = (wire::decode_offset(data), wire::decode_hole(data));
    let _ = (wire::decode_error(wire::chunk::ERROR, data), wire::decode_error(wire::chunk::ERROR_OFFSET, data));
    let status = wire::decode_block_status(data);
    if let Ok((context, runs)) = &status {
        assert!(runs.iter().all(|BlockRun { bytes, .. }| *bytes > 0));
        let mut out = Vec::new();
        wire::encode_block_status(&mut out, 7, *context, runs, true);
        assert_eq!(out.get(ReplyHeader::SHORT_BYTES + ReplyHeader::MORE_BYTES..), Some(data));
    }
    let head = reply(data);
    status.is_ok() | head.is_ok()
}

fn reply(data: &[u8]) -> Result<(), WireError> {
    let long = data.first_chunk().is_some_and(ReplyHeader::is_long);
    let head = ReplyHeader::decode(data)?;
    let mut out = Vec::new();
    match head {
        ReplyHeader::Simple { error, cookie } => wire::encode_simple(&mut out, error, cookie),
        ReplyHeader::Chunk(Chunk { flags, kind, cookie, length }) => {
            wire::encode_chunk(&mut out, &Chunk { flags, kind, cookie, length });
        }
    }
    assert_eq!(data.get(..out.len()), Some(&*out));
    assert_eq!(long, matches!(head, ReplyHeader::Chunk(_)));
    Ok(())
}
