//! Random operations over every format, done by this tool and by QEMU's in turn, against a model in memory. After each
//! of them both tools find nothing wrong, see what the model holds, and tell the same map.

#[path = "support/model.rs"]
mod model;

use model::{KINDS, Model, has_peer};

#[test]
fn both_tools_agree_on_what_is_there() {
    if !has_peer() {
        return;
    }
    let rounds = if std::env::var_os("VIREO_TEST_LONG").is_some() { 20 } else { 1 };
    for (index, kind) in KINDS.iter().enumerate() {
        for round in 0..rounds {
            let mut model = Model::new(*kind, 1 + index as u64 * 1000 + round);
            for step in 0..24 {
                if step % 3 == 2 {
                    model.maintain()
                } else {
                    model.request()
                }
                if step % 4 == 3 {
                    model.judge();
                }
            }
            model.judge_snapshots();
        }
    }
}
