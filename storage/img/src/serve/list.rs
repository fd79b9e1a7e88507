//! `-L`: what another server exports, printed as qemu-nbd does.

use block::nbd::wire::transmission_flag as can;
use block::nbd::{Export, TlsClient, list_exports};
use block::spec::{NbdAddress, NbdSpec, NbdTls};

use super::ServeError;
use crate::error::ImgError;
use crate::output::say;

const FLAGS: [(u16, &str); 12] = [
    (can::READ_ONLY, "readonly"),
    (can::SEND_FLUSH, "flush"),
    (can::SEND_FUA, "fua"),
    (can::ROTATIONAL, "rotational"),
    (can::SEND_TRIM, "trim"),
    (can::SEND_WRITE_ZEROES, "zeroes"),
    (can::SEND_DF, "df"),
    (can::CAN_MULTI_CONN, "multi"),
    (can::SEND_RESIZE, "resize"),
    (can::SEND_CACHE, "cache"),
    (can::SEND_FAST_ZERO, "fast-zero"),
    (can::BLOCK_STATUS_PAYLOAD, "block-status-payload"),
];

/// Connects to a server, with TLS or without, and prints what it has.
pub fn print(address: NbdAddress, tls: Option<(&TlsClient, NbdTls)>) -> Result<u8, ImgError> {
    let (client, tls) = tls.unzip();
    let spec = NbdSpec { tls, ..NbdSpec::new(address, "") };
    let exports = list_exports(&spec, client).map_err(ServeError::Nbd)?;
    say(described(&exports));
    Ok(0)
}

fn described(exports: &[Export]) -> String {
    let mut text = format!("exports available: {}\n", exports.len());
    for export in exports {
        text += &format!(" export: '{}'\n", shown(&export.name));
        if !export.description.is_empty() {
            text += &format!("  description: {}\n", shown(&export.description));
        }
        if let Some((size_bytes, flags)) = export.size_and_flags.filter(|(_, flags)| flags & can::HAS_FLAGS != 0) {
            let names: String =
                FLAGS.iter().filter(|(bit, _)| flags & bit != 0).map(|(_, n)| format!(" {n}")).collect();
            text += &format!("  size:  {size_bytes}\n  flags: 0x{flags:x} ({names} )\n");
        }
        if let Some(sizes) = export.sizes {
            text +=
                &format!("  min block: {}\n  opt block: {}\n  max block: {}\n", sizes.min, sizes.preferred, sizes.max);
        }
        // Headers with 64 bits for lengths are not asked for.
        text += "  transaction size: 32-bit\n";
        if !export.contexts.is_empty() {
            text += &format!("  available meta contexts: {}\n", export.contexts.len());
            export.contexts.iter().for_each(|name| text += &format!("   {}\n", shown(name)));
        }
    }
    text
}

/// Text of a server, without what would steer a terminal.
fn shown(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[test]
fn exports_are_described_as_qemu_nbd_does() {
    let export = Export {
        name: "a\u{1b}[2J".to_owned(),
        description: "b".to_owned(),
        size_and_flags: Some((1 << 20, 0x3)),
        sizes: Some(block::nbd::wire::BlockSizes::default()),
        contexts: vec!["base:allocation".to_owned()],
    };
    let want = "exports available: 1\n export: 'a?[2J'\n  description: b\n  size:  1048576\n  flags: 0x3 ( readonly )\n  \
                min block: 1\n  opt block: 4096\n  max block: 33554432\n  transaction size: 32-bit\n  \
                available meta contexts: 1\n   base:allocation\n";
    assert_eq!(described(&[export]), want);
}
