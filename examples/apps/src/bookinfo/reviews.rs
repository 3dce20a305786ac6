//! Reviews of a book. v1 shows no stars, v2 black ones, v3 red ones; the stars come from ratings.

use std::time::Duration;

use axum::extract::{Path, State};
use axum::routing::get;
use axum::{Json, Router};
use http::{HeaderMap, StatusCode};
use serde_json::{Value, json};

use super::Environment;
use super::client::Caller;

#[derive(Clone)]
struct Reviews {
    environment: Environment,
    /// Colour of the stars, `None` for no stars.
    star_color: Option<&'static str>,
    caller: Caller,
}

/// `/health` and `/reviews/{id}`.
pub(crate) fn router(environment: &Environment) -> Router {
    let star_color = match environment.version.as_str() {
        "v2" => Some("black"),
        "v3" => Some("red"),
        _ => None,
    };
    let state = Reviews {
        environment: environment.clone(),
        star_color,
        caller: Caller::new(),
    };
    Router::new()
        .route(
            "/health",
            get(|| async { Json(json!({ "status": "Reviews is healthy" })) }),
        )
        .route("/reviews/{id}", get(reviews))
        .with_state(state)
}

async fn reviews(
    State(state): State<Reviews>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> (StatusCode, Json<Value>) {
    let ratings = match state.star_color {
        Some(color) => Some((color, ask_ratings(&state, &id, &headers, color).await)),
        None => None,
    };
    let review = |reviewer: &str, text: &str| {
        let mut review = json!({ "reviewer": reviewer, "text": text });
        if let Some((color, ratings)) = &ratings {
            review["rating"] = match ratings
                .as_ref()
                .and_then(|ratings| ratings["ratings"][reviewer].as_i64())
            {
                Some(stars) => json!({ "stars": stars, "color": color }),
                None => json!({ "error": "Ratings service is currently unavailable" }),
            };
        }
        review
    };
    let body = json!({
        "id": id,
        "podname": state.environment.pod_name,
        "clustername": state.environment.cluster_name,
        "reviews": [
            review("Reviewer1", "An extremely entertaining play by Shakespeare. The slapstick humour is refreshing!"),
            review("Reviewer2", "Absolutely fun and entertaining. The play lacks thematic depth when compared to other plays by Shakespeare."),
        ],
    });
    (StatusCode::OK, Json(body))
}

async fn ask_ratings(state: &Reviews, id: &str, headers: &HeaderMap, color: &str) -> Option<Value> {
    // The original waits 10 s with black stars and 2.5 s with red ones; Istio's fault tasks rely on it.
    let timeout = if color == "black" {
        Duration::from_secs(10)
    } else {
        Duration::from_millis(2500)
    };
    let path = format!("/ratings/{id}");
    let (status, body) = state
        .caller
        .get(&state.environment.ratings, &path, headers, timeout)
        .await?;
    status
        .is_success()
        .then(|| serde_json::from_slice(&body).ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use http::Request;
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    use super::*;

    async fn reviews_of(environment: &Environment) -> Value {
        let response = router(environment)
            .oneshot(Request::get("/reviews/0").body(Body::empty()).unwrap())
            .await
            .unwrap();
        serde_json::from_slice(&response.into_body().collect().await.unwrap().to_bytes()).unwrap()
    }

    #[tokio::test]
    async fn version_1_shows_no_stars() {
        let environment = Environment {
            version: "v1".to_owned(),
            ..Environment::default()
        };
        assert_eq!(reviews_of(&environment).await["reviews"][0].get("rating"), None);
    }

    #[tokio::test]
    async fn version_3_shows_red_stars_from_ratings_and_says_so_when_there_are_none() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let ratings = listener.local_addr().unwrap().to_string();
        let healthy = Environment {
            version: "v1".to_owned(),
            ..Environment::default()
        };
        let server = tokio::spawn(async move {
            axum::serve(listener, super::super::ratings::router(&healthy))
                .await
                .unwrap();
        });
        let environment = Environment {
            version: "v3".to_owned(),
            ratings,
            ..Environment::default()
        };
        let body = reviews_of(&environment).await;
        assert_eq!(
            body["reviews"][1]["rating"],
            json!({ "stars": 4, "color": "red" })
        );
        server.abort();
        let gone = Environment {
            ratings: "127.0.0.1:1".to_owned(),
            ..environment
        };
        let body = reviews_of(&gone).await;
        assert_eq!(
            body["reviews"][0]["rating"]["error"],
            "Ratings service is currently unavailable"
        );
    }
}
