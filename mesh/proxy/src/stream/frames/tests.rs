//! Verdicts on frames that come and go in pieces of any size.

use proptest::prelude::*;
use tokio::io::AsyncReadExt;

use super::*;

fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [
        &[length[1], length[2], length[3], kind, flags, 0, 0, 0, 1][..],
        payload,
    ]
    .concat()
}

/// The verdict on what a client sends, `step` bytes at a time.
fn judged(limits: FrameLimits, frames: &[Vec<u8>], step: usize) -> Option<Verdict> {
    let mut watch = Frames::of_client((), limits, None, Rc::default());
    let bytes = [&[b'P'; PREFACE as usize][..], &frames.concat()].concat();
    bytes.chunks(step).find_map(|piece| watch.received(piece))
}

#[test]
fn frames_without_use_are_counted_and_others_are_not() {
    let limits = FrameLimits::default();
    let strict = FrameLimits {
        empty: 0,
        priority: 0,
        window_updates: 1,
        resets: Some((2, 0)),
    };
    let empty = frame(DATA, 0, b"");
    let padded = frame(DATA, PADDED, &[3, 0, 0, 0]);
    let last = frame(DATA, END_STREAM, b"");
    let full = frame(DATA, 0, b"x");
    let full_padded = frame(DATA, PADDED, &[1, b'x', 0]);
    let head = frame(HEADERS, END_HEADERS, b"h");
    let empty_more = frame(CONTINUATION, 0, b"");
    let priority = frame(PRIORITY, 0, &[0; 5]);
    let update = frame(WINDOW_UPDATE, 0, &[0, 0, 0, 1]);
    let reset = frame(RST_STREAM, 0, &[0; 4]);
    let many = |frame: &Vec<u8>, count: usize| vec![frame.clone(); count];
    for (name, limits, frames, verdict) in [
        ("one empty", limits, many(&empty, 1), None),
        ("two", limits, many(&empty, 2), Some(Verdict::EmptyFrames)),
        (
            "one where none may be",
            strict,
            many(&empty, 1),
            Some(Verdict::EmptyFrames),
        ),
        (
            "padding is nothing",
            strict,
            many(&padded, 1),
            Some(Verdict::EmptyFrames),
        ),
        ("the last one", strict, many(&last, 3), None),
        ("content", strict, many(&full, 3), None),
        ("padded content", strict, many(&full_padded, 3), None),
        (
            "apart",
            limits,
            [many(&empty, 1), many(&full, 1), many(&empty, 1)].concat(),
            None,
        ),
        (
            "heads",
            limits,
            [many(&head, 1), many(&empty_more, 2)].concat(),
            Some(Verdict::EmptyFrames),
        ),
        ("priorities", limits, many(&priority, 100), None),
        ("one more", limits, many(&priority, 101), Some(Verdict::Priority)),
        ("none may be", strict, many(&priority, 1), Some(Verdict::Priority)),
        ("updates", limits, many(&update, 5), None),
        ("one more", limits, many(&update, 6), Some(Verdict::WindowUpdates)),
        ("resets", limits, many(&reset, 5_000), None),
        ("two resets", strict, many(&reset, 2), None),
        ("three", strict, many(&reset, 3), Some(Verdict::Resets)),
    ] {
        for step in [1, 7, usize::MAX] {
            assert_eq!(judged(limits, &frames, step), verdict, "{name} by {step}");
        }
    }
}

#[test]
fn what_was_sent_allows_more_window_updates_and_priorities() {
    let update = frame(WINDOW_UPDATE, 0, &[0, 0, 0, 1]);
    let priority = frame(PRIORITY, 0, &[0; 5]);
    let limits = FrameLimits {
        priority: 2,
        ..FrameLimits::default()
    };
    let judged = |frames: Vec<u8>| {
        let mut watch = Frames::of_client((), limits, None, Rc::default());
        watch.received(&[b'P'; PREFACE as usize]);
        for piece in [frame(HEADERS, END_HEADERS, b"h"), frame(DATA, 0, &[0; 100])]
            .concat()
            .chunks(5)
        {
            watch.sent(piece);
        }
        watch.received(&frames)
    };
    // 5 + 2 * (1 stream + 10 * 1 frame), 2 * (1 + 1 stream).
    assert_eq!(judged([update.repeat(27), priority.repeat(4)].concat()), None);
    assert_eq!(judged(update.repeat(28)), Some(Verdict::WindowUpdates));
    assert_eq!(judged(priority.repeat(5)), Some(Verdict::Priority));
}

#[test]
fn resets_may_come_again_after_a_while() {
    let start = Instant::now();
    let mut resets = Resets::new((2, 1));
    let at = |millis| start + Duration::from_millis(millis);
    let taken = [0, 0, 0, 900, 1100, 1100, 60_000, 60_000, 60_000].map(|millis| resets.take(at(millis)));
    assert_eq!(taken, [false, false, true, true, false, true, false, false, true]);
}

#[tokio::test(start_paused = true)]
async fn a_header_block_that_does_not_come_to_its_end_in_time_is_late_and_one_that_does_is_not() {
    use tokio::io::AsyncWriteExt;
    let limit = Duration::from_secs(1);
    for (name, frames, late) in [
        ("whole", vec![frame(HEADERS, END_HEADERS, b"h")], false),
        ("no end", vec![frame(HEADERS, 0, b"h")], true),
        (
            "no end of more",
            vec![frame(HEADERS, 0, b"h"), frame(CONTINUATION, 0, b"h")],
            true,
        ),
        (
            "in two",
            vec![frame(HEADERS, 0, b"h"), frame(CONTINUATION, END_HEADERS, b"h")],
            false,
        ),
        (
            "half a frame",
            vec![frame(HEADERS, END_HEADERS, b"half")[..10].to_vec()],
            true,
        ),
        ("no head", vec![frame(DATA, 0, b"content")[..10].to_vec()], false),
    ] {
        let (near, mut far) = tokio::io::duplex(1024);
        let watched = Rc::new(Watched::default());
        let mut stream = Frames::of_client(near, FrameLimits::default(), Some(limit), watched.clone());
        far.write_all(&[b'P'; PREFACE as usize]).await.unwrap();
        far.write_all(&frames.concat()).await.unwrap();
        let mut bytes = Vec::new();
        let read = tokio::time::timeout(limit * 3, stream.read_to_end(&mut bytes)).await;
        assert!(read.is_err(), "{name}: neither ends");
        assert_eq!(watched.verdict(), late.then_some(Verdict::LateHeaders), "{name}");
        assert!(watched.take_heard() && !watched.take_heard());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn however_frames_are_cut_as_many_are_seen(
        frames in prop::collection::vec((0u8..12, any::<u8>(), 0usize..40), 0..20),
        step in 1usize..50,
    ) {
        let all: Vec<_> = frames.iter().map(|(kind, flags, length)| frame(*kind, *flags, &vec![0; *length])).collect();
        let bytes = all.concat();
        let mut walk = Walk::default();
        let mut seen = Vec::new();
        for piece in bytes.chunks(step) {
            let mut rest = piece;
            while let Some(head) = walk.next(&mut rest) {
                seen.push((head.kind, head.flags, head.length as usize));
            }
        }
        prop_assert_eq!(seen, frames);
        prop_assert!(walk.is_between());
    }
}
