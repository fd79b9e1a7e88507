//! Random operations over every format, done by this tool and by QEMU's in turn, against a model in memory. After each
//! of them both tools find nothing wrong, see what the model holds, and tell the same map.

#[path = "support/model.rs"]
mod model;

use model::{KINDS, Model, has_peer, seeds};

#[test]
fn both_tools_agree_on_what_is_there() {
    if !has_peer() {
        return;
    }
    for kind in KINDS {
        for seed in seeds(5) {
            let mut model = Model::new(*kind, seed);
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
