//! What clients and the daemon's machines say.

use std::io::Write;
use std::os::unix::net::UnixStream;

use arbitrary::{Arbitrary, Unstructured};
use monitor::{Channel, Message, Request};
use rpc_wire::frame::{FrameReader, RawHeader};
use rpc_wire::remote;
use rpc_wire::xdr::{Xdr, from_bytes, to_bytes};
use xml::{DefineContext, DomainDefinition};

/// A packet that is nearly right: parsers see past their first checks.
#[derive(Arbitrary, Debug)]
struct Packet {
    length_lie: Option<u32>,
    header: [u32; 6],
    likely: bool,
    payload: Vec<u8>,
}

impl Packet {
    fn bytes(&self) -> Vec<u8> {
        let mut h = self.header;
        if self.likely {
            // The remote program's version 1, small procedure numbers, kinds and states that exist.
            h = [0x2000_8086, 1, h[2] % 500, h[3] % 6, h[4], h[5] % 3];
        }
        let header =
            RawHeader { program: h[0], version: h[1], procedure: h[2], kind: h[3], serial: h[4], status: h[5] };
        let mut body = to_bytes(&header);
        body.extend(&self.payload);
        let length = self.length_lie.unwrap_or(body.len() as u32 + 4);
        [&length.to_be_bytes()[..], &body].concat()
    }
}

/// Decodes; what decodes must encode to something that decodes to the same.
fn round<T: Xdr>(payload: &[u8]) -> bool {
    let Ok(value) = from_bytes::<T>(payload) else { return false };
    let encoded = to_bytes(&value);
    let again = from_bytes::<T>(&encoded).map(|value| to_bytes(&value));
    assert_eq!(again.ok().as_ref(), Some(&encoded));
    true
}

/// Frames of libvirt's protocol, cut at will, and the payloads of calls.
pub fn frames(data: &[u8]) -> bool {
    let mut taken = false;
    let mut reader = FrameReader::new();
    let mut made = Vec::new();
    let mut source = Unstructured::new(data);
    while let Ok(packet) = Packet::arbitrary(&mut source) {
        made.extend(packet.bytes());
        if source.is_empty() {
            break;
        }
    }
    for stream in [data, &made] {
        for chunk in stream.chunks(1 + data.len() % 97) {
            reader.push(chunk);
            while let Ok(Some(frame)) = reader.next_frame() {
                taken = true;
                payloads(&frame.payload);
            }
        }
    }
    payloads(data);
    taken
}

fn payloads(payload: &[u8]) {
    let _ = round::<remote::connect_open::Args>(payload)
        | round::<remote::connect_get_domain_capabilities::Args>(payload)
        | round::<remote::node_get_cpu_stats::Reply>(payload)
        | round::<remote::StatsRecord>(payload)
        | round::<remote::DomainInterface>(payload)
        | round::<remote::VcpuInfo>(payload);
}

/// Lines between the daemon and a machine, in both directions.
pub fn monitor_lines(data: &[u8]) -> bool {
    let mut taken = false;
    // What does not fit into the socket's buffer would block.
    let data = data.get(..64 << 10).unwrap_or(data);
    for towards_machine in [true, false] {
        let Ok((mut near, far)) = UnixStream::pair() else { return false };
        if near.write_all(data).is_err() {
            return false;
        }
        drop(near);
        let mut channel = Channel::new(far);
        let mut lines = 0;
        while lines <= data.len() {
            let more = match towards_machine {
                true => channel.receive::<Request>().map(|_| ()),
                false => channel.receive::<Message>().map(|_| ()),
            };
            if matches!(
                more,
                Err(monitor::ChannelError::Closed | monitor::ChannelError::Io(_) | monitor::ChannelError::TooLong)
            ) {
                break;
            }
            taken |= more.is_ok();
            lines += 1;
        }
    }
    taken
}

/// Domain documents: what is accepted is written in a form that is accepted again and means the same.
pub fn domain_xml(data: &[u8]) -> bool {
    let mut random = || [7; 16];
    let mut context = DefineContext { emulator: "/usr/bin/vireo-vmm", random: &mut random };
    let _ = DomainDefinition::identify(data);
    let Ok(defined) = DomainDefinition::define(data, &mut context) else { return false };
    let written = defined.to_xml();
    let again = DomainDefinition::load(written.as_bytes());
    assert_eq!(again.map(|d| d.to_xml()).ok().as_deref(), Some(written.as_str()));
    let _ = defined.check_buildable();
    let _ = defined.check_schema();
    true
}
