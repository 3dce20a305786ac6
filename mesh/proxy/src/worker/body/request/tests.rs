use http_body_util::BodyExt;

use super::*;
use crate::worker::incoming::Incoming;

async fn next(body: &mut UpstreamBody) -> Option<Bytes> {
    let frame = body.frame().await?.unwrap();
    Some(frame.into_data().unwrap())
}

#[tokio::test]
async fn an_answer_that_comes_before_a_repeated_body_was_sent_cuts_nothing_out_of_it() {
    let mut inbound = Inbound::new(Incoming::Empty);
    inbound.ahead = ["a", "b", "c", "d"]
        .map(|text| Frame::data(Bytes::from(text)))
        .into();
    inbound.ended = true;
    let source = RequestSource::new(inbound, 100, None);
    let mut first = UpstreamBody::stream(&source);
    for expected in ["a", "b", "c"] {
        assert_eq!(next(&mut first).await.unwrap(), expected);
    }
    drop(first);
    let mut second = UpstreamBody::stream(&source);
    assert_eq!(next(&mut second).await.unwrap(), "a");
    source.borrow_mut().stop_keeping();
    for expected in ["b", "c", "d"] {
        assert_eq!(next(&mut second).await.unwrap(), expected);
    }
    assert_eq!(next(&mut second).await, None);
    assert!(source.borrow().kept.is_empty(), "and nothing is held any longer");
}
