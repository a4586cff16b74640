//! What the strategies make, and what the scripts come to: a kind that hardly occurs is not tested.

use std::collections::BTreeMap;
use std::fmt::Debug;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use crate::guest::{Piece, Place, piece};
use crate::palette;
use crate::script::{action, reaction, script};

/// Values that are made of each strategy, and how many of each kind are wanted.
const MADE: usize = 4000;
const FLOOR: u64 = 20;
/// What serves hits.
const STEP_OVERS: [&str; 5] = ["repair", "view-step", "view-fast-step", "emulate", "interpret"];
/// Scripts that are run.
const SCRIPTS: usize = 60;

fn made<T: Debug>(strategy: impl Strategy<Value = T>, number: usize) -> impl Iterator<Item = T> {
    let mut runner = TestRunner::deterministic();
    (0..number).map(move |_| strategy.new_tree(&mut runner).expect("a value").current())
}

/// Counts by the names of variants, with those of the places in them.
fn count(values: impl Iterator<Item = String>) -> BTreeMap<String, u64> {
    let mut counts = BTreeMap::new();
    for value in values {
        let name = value.split(['(', '{']).next().unwrap_or_default().to_owned();
        *counts.entry(name).or_default() += 1;
    }
    counts
}

fn assert_floor(counts: &BTreeMap<String, u64>, kinds: usize) {
    println!("{counts:?}");
    assert_eq!(counts.len(), kinds, "kinds: {counts:?}");
    let rare: Vec<_> = counts.iter().filter(|(_, count)| **count < FLOOR).collect();
    assert!(rare.is_empty(), "hardly ever made: {rare:?}");
}

#[test]
fn every_kind_of_piece_action_and_reaction_is_made() {
    let debug = |value: &dyn Debug| format!("{value:?}");
    assert_floor(&count(made(piece(), MADE).map(|piece| debug(&piece))), PIECES);
    assert_floor(&count(made(action(2), MADE).map(|action| debug(&action))), 9);
    assert_floor(&count(made(reaction(), MADE).map(|reaction| debug(&reaction))), 5);
    let conditions = made(piece(), MADE * 10).filter_map(|piece| match piece {
        Piece::JumpIf(condition, _) => Some(format!("condition {condition}")),
        Piece::Arithmetic(op, ..) => Some(format!("arithmetic {op}")),
        Piece::ArithmeticImmediate(op, ..) => Some(format!("arithmetic {op} with an immediate")),
        Piece::Store(_, place) | Piece::Load(_, place) => Some(match place {
            Place::Data(at) if at % 0x1000 > 0xff8 => "across the end of a page".to_owned(),
            place => debug(&place),
        }),
        _ => None,
    });
    assert_floor(&count(conditions), 16 + 7 + 6 + 5 + 1);
}

/// All of [`Piece`]'s variants.
const PIECES: usize = 35;

#[test]
fn scripts_come_to_everything_that_is_counted() {
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for vcpus in [1, 2] {
        for script in made(script(vcpus, palette(|_| true, 2)), SCRIPTS) {
            for (what, times) in script.run() {
                *counts.entry(what).or_default() += times;
            }
        }
    }
    println!("{counts:?}");
    // The rest comes of a few scripts only.
    let floor = |what: &str| if STEP_OVERS.contains(&what) { 10 } else { 1 };
    let rare: Vec<_> = counts.iter().filter(|(what, count)| **count < floor(what)).collect();
    assert!(rare.is_empty() && counts.len() == 14, "hardly ever: {rare:?} of {counts:?}");
}
