//! Golden bytes of saved states: a state that has shipped keeps its encoding.

use std::path::Path;

/// Encodes `state` and decodes it again, as a snapshot does.
///
/// # Panics
/// If the state does not survive; this is for tests.
pub fn recode<S>(state: &S) -> S
where
    S: minicbor::Encode<()> + for<'b> minicbor::Decode<'b, ()>,
{
    let bytes = minicbor::to_vec(state).expect("a state encodes");
    minicbor::decode(&bytes).expect("a state decodes from its own bytes")
}

/// Compares the encoding of `state` with the hexadecimal bytes in `file`; with `UPDATE=1` in the environment writes them.
///
/// # Panics
/// If they differ, or the file cannot be read; this is for tests.
pub fn check<S: minicbor::Encode<()>>(file: &Path, state: &S) {
    let hex: String = minicbor::to_vec(state).expect("a state encodes").iter().map(|b| format!("{b:02x}")).collect();
    if std::env::var_os("UPDATE").is_some() {
        std::fs::create_dir_all(file.parent().expect("a file has a directory")).expect("testdata can be written");
        std::fs::write(file, format!("{hex}\n")).expect("testdata can be written");
    }
    let want = std::fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}; UPDATE=1 writes it", file.display()));
    assert_eq!(hex, want.trim(), "{}: a shipped state is never edited: add a V2 with a conversion", file.display());
}
