//! One error for the formats of other vendors, for code that serves them all.

use thiserror::Error;

use crate::vdi::VdiError;
use crate::vhdx::VhdxError;
use crate::vmdk::VmdkError;
use crate::vpc::VpcError;

/// Why an image of another vendor's format is refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum FormatError {
    /// A vmdk.
    #[error(transparent)]
    Vmdk(#[from] VmdkError),
    /// A vdi.
    #[error(transparent)]
    Vdi(#[from] VdiError),
    /// A vpc, also called VHD.
    #[error(transparent)]
    Vpc(#[from] VpcError),
    /// A vhdx.
    #[error(transparent)]
    Vhdx(#[from] VhdxError),
    /// A block is stored in a way that cannot be changed.
    #[error("block {block} is stored in a way that cannot be changed in place; convert the image to a new one")]
    Immutable {
        /// Which block of the disk.
        block: u64,
    },
}

impl FormatError {
    /// Whether the image is whole, but needs something that is not built; otherwise it contradicts itself.
    pub fn is_unsupported(&self) -> bool {
        match self {
            FormatError::Vmdk(error) => matches!(
                error,
                VmdkError::Version(_)
                    | VmdkError::Flags(_)
                    | VmdkError::Cowd
                    | VmdkError::ReadOnlyVersion
                    | VmdkError::Compression(_)
                    | VmdkError::NoGrainTable { .. }
                    | VmdkError::ExtentType { .. }
                    | VmdkError::CreateType(_)
                    | VmdkError::Name(_)
                    | VmdkError::Size { .. }
                    | VmdkError::Compat6HwVersion
                    | VmdkError::FlatZeroedGrain
                    | VmdkError::FlatParent
                    | VmdkError::StreamOrder { .. }
                    | VmdkError::StreamOnly
                    | VmdkError::StreamNotEmpty
                    | VmdkError::Full
            ),
            FormatError::Vdi(error) => matches!(
                error,
                VdiError::Version(_)
                    | VdiError::ImageType(_)
                    | VdiError::Linked
                    | VdiError::SectorSize(_)
                    | VdiError::BlockExtra(_)
                    | VdiError::Size(_)
            ),
            FormatError::Vpc(error) => {
                matches!(
                    error,
                    VpcError::Version(_) | VpcError::Differencing | VpcError::DiskType(_) | VpcError::Size(_)
                )
            }
            FormatError::Vhdx(error) => matches!(
                error,
                VhdxError::Version(_)
                    | VhdxError::LogVersion(_)
                    | VhdxError::UnknownRequired { .. }
                    | VhdxError::Differencing
                    | VhdxError::LogTooLarge { .. }
                    | VhdxError::Size(_)
                    | VhdxError::NewBlockSize(_)
                    | VhdxError::NewLogSize(_)
            ),
            FormatError::Immutable { .. } => true,
        }
    }
}
