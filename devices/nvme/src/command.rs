//! Commands as they lie in a submission queue, and what their completion says.

/// Bytes of a submission queue entry.
pub(crate) const COMMAND_BYTES: u64 = 64;
/// Bytes of a completion queue entry.
pub(crate) const COMPLETION_BYTES: u64 = 16;

/// A command, copied out of guest memory. NVME 4.2
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Command {
    pub(crate) opcode: u8,
    /// Fused operation and data pointer kind; both must be 0 here.
    pub(crate) flags: u8,
    pub(crate) id: u16,
    pub(crate) namespace: u32,
    pub(crate) prp1: u64,
    pub(crate) prp2: u64,
    /// Command dwords 10 to 15.
    pub(crate) dwords: [u32; 6],
}

impl Command {
    pub(crate) fn parse(bytes: &[u8; COMMAND_BYTES as usize]) -> Command {
        let word = |at: usize| bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b));
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let [opcode, flags, id_low, id_high, ..] = *bytes;
        Command {
            opcode,
            flags,
            id: u16::from_le_bytes([id_low, id_high]),
            namespace: word(4),
            prp1: long(24),
            prp2: long(32),
            dwords: [word(40), word(44), word(48), word(52), word(56), word(60)],
        }
    }
    pub(crate) fn dword10(&self) -> u32 {
        self.dwords[0]
    }
    pub(crate) fn dword11(&self) -> u32 {
        self.dwords[1]
    }
    pub(crate) fn dword12(&self) -> u32 {
        self.dwords[2]
    }
    pub(crate) fn dword13(&self) -> u32 {
        self.dwords[3]
    }
    /// First block of a read or write.
    pub(crate) fn first_block(&self) -> u64 {
        u64::from(self.dwords[0]) | u64::from(self.dwords[1]) << 32
    }
    /// Blocks of a read or write: the number in the command is one less.
    pub(crate) fn blocks(&self) -> u64 {
        u64::from(self.dwords[2] & 0xffff) + 1
    }
}

/// Status of a completion: status code and type, NVME 4.6.1; the "do not retry" bit is added where it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Status(pub(crate) u16);

#[allow(missing_docs)]
impl Status {
    pub(crate) const SUCCESS: Status = Status(0);
    pub(crate) const INVALID_OPCODE: Status = Status(0x001);
    pub(crate) const INVALID_FIELD: Status = Status(0x002);
    pub(crate) const DATA_TRANSFER: Status = Status(0x004);
    pub(crate) const INVALID_NAMESPACE: Status = Status(0x00b);
    pub(crate) const SEQUENCE: Status = Status(0x00c);
    pub(crate) const PRP_OFFSET: Status = Status(0x013);
    pub(crate) const OUT_OF_RANGE: Status = Status(0x080);
    pub(crate) const COMPLETION_QUEUE: Status = Status(0x100);
    pub(crate) const QUEUE_ID: Status = Status(0x101);
    pub(crate) const QUEUE_SIZE: Status = Status(0x102);
    pub(crate) const TOO_MANY_EVENT_REQUESTS: Status = Status(0x105);
    pub(crate) const INTERRUPT_VECTOR: Status = Status(0x108);
    pub(crate) const LOG_PAGE: Status = Status(0x109);
    pub(crate) const QUEUE_DELETION: Status = Status(0x10c);
    pub(crate) const READ_ONLY: Status = Status(0x182);
    pub(crate) const WRITE_FAULT: Status = Status(0x280);
    pub(crate) const READ_ERROR: Status = Status(0x281);

    /// Bits 15:1 of the completion's last word; the phase is bit 0.
    pub(crate) fn field(self) -> u16 {
        const DO_NOT_RETRY: u16 = 1 << 14;
        // A failed transfer of media data may be tried again.
        let final_answer = self != Status::SUCCESS && self != Status::WRITE_FAULT && self != Status::READ_ERROR;
        self.0 | if final_answer { DO_NOT_RETRY } else { 0 }
    }
}

/// What became of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It is complete: status, and command-specific dword 0.
    Done(Status, u32),
    /// It stays outstanding: an asynchronous event request.
    Outstanding,
    /// Not now: it is offered again when the machine resumes.
    Later,
    /// Not now: its queue goes on when the disk's limits allow it.
    Wait,
}

impl From<Status> for Outcome {
    fn from(status: Status) -> Outcome {
        Outcome::Done(status, 0)
    }
}
