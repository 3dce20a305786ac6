//! Ratings of a book. Its versions misbehave on purpose: `v-faulty` fails half of the requests, `v-delayed` delays
//! half of them by 7 s, `v-unavailable` fails everything for a minute in two, `v-unhealthy` does so in its health too.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{Path, State};
use axum::routing::get;
use axum::{Json, Router};
use http::StatusCode;
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::Environment;

/// How long `v-delayed` delays.
const DELAY: Duration = Duration::from_secs(7);
/// `v-unavailable` and `v-unhealthy` change between up and down with this period.
const PERIOD: Duration = Duration::from_secs(60);

#[derive(Clone)]
struct Ratings {
    behaviour: Behaviour,
    started: Instant,
    stored: Arc<Mutex<BTreeMap<i64, Value>>>,
    requests: Arc<Mutex<u64>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Behaviour {
    Healthy,
    Faulty,
    Delayed,
    Unavailable,
    Unhealthy,
}

/// `/health` and `/ratings/{id}`.
pub(crate) fn router(environment: &Environment) -> Router {
    let behaviour = match environment.version.as_str() {
        "v-faulty" => Behaviour::Faulty,
        "v-delayed" => Behaviour::Delayed,
        "v-unavailable" => Behaviour::Unavailable,
        "v-unhealthy" => Behaviour::Unhealthy,
        _ => Behaviour::Healthy,
    };
    let state = Ratings {
        behaviour,
        started: Instant::now(),
        stored: Arc::default(),
        requests: Arc::default(),
    };
    Router::new()
        .route("/health", get(health))
        .route("/ratings/{id}", get(read).post(write))
        .with_state(state)
}

impl Ratings {
    fn is_down(&self) -> bool {
        (self.started.elapsed().as_secs() / PERIOD.as_secs()) % 2 == 1
    }
}

async fn health(State(ratings): State<Ratings>) -> (StatusCode, Json<Value>) {
    if ratings.behaviour == Behaviour::Unhealthy && ratings.is_down() {
        return (
            StatusCode::INTERNAL_SERVER_ERROR,
            Json(json!({ "status": "Ratings is not healthy" })),
        );
    }
    (StatusCode::OK, Json(json!({ "status": "Ratings is healthy" })))
}

async fn read(State(ratings): State<Ratings>, Path(id): Path<String>) -> (StatusCode, Json<Value>) {
    let Ok(id) = id.parse::<i64>() else {
        return not_numeric();
    };
    let odd = {
        let mut requests = ratings.requests.lock();
        *requests += 1;
        *requests % 2 == 1
    };
    let unavailable = || {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            Json(json!({ "error": "Service unavailable" })),
        )
    };
    match ratings.behaviour {
        Behaviour::Faulty if odd => return unavailable(),
        Behaviour::Unavailable | Behaviour::Unhealthy if ratings.is_down() => return unavailable(),
        Behaviour::Delayed if odd => tokio::time::sleep(DELAY).await,
        Behaviour::Healthy
        | Behaviour::Faulty
        | Behaviour::Delayed
        | Behaviour::Unavailable
        | Behaviour::Unhealthy => {}
    }
    let stored = ratings.stored.lock().get(&id).cloned();
    let body = stored.unwrap_or_else(|| json!({ "Reviewer1": 5, "Reviewer2": 4 }));
    (StatusCode::OK, Json(json!({ "id": id, "ratings": body })))
}

/// The most products that are kept; more are refused.
const STORED_MAX: usize = 10_000;

async fn write(
    State(ratings): State<Ratings>,
    Path(id): Path<String>,
    Json(body): Json<Value>,
) -> (StatusCode, Json<Value>) {
    let Ok(id) = id.parse::<i64>() else {
        return not_numeric();
    };
    let mut stored = ratings.stored.lock();
    if stored.len() >= STORED_MAX && !stored.contains_key(&id) {
        return (
            StatusCode::INSUFFICIENT_STORAGE,
            Json(json!({ "error": "too many products" })),
        );
    }
    stored.insert(id, body.clone());
    (StatusCode::OK, Json(json!({ "id": id, "ratings": body })))
}

fn not_numeric() -> (StatusCode, Json<Value>) {
    (
        StatusCode::BAD_REQUEST,
        Json(json!({ "error": "please provide numeric product ID" })),
    )
}
