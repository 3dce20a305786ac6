//! bookinfo's front page: asks details and reviews and shows both.

use std::fmt::Write as _;
use std::time::Duration;

use axum::extract::{Form, Path, State};
use axum::response::{Html, IntoResponse, Redirect, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use http::header::{COOKIE, SET_COOKIE};
use http::{HeaderMap, HeaderValue, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::Environment;
use super::client::Caller;

/// The original waits 3 s for each service, and asks reviews twice.
const TIMEOUT: Duration = Duration::from_secs(3);
const REVIEWS_ATTEMPTS: usize = 2;

#[derive(Clone)]
struct Page {
    environment: Environment,
    caller: Caller,
}

/// `/`, `/productpage`, `/login`, `/logout`, `/health` and the API below `/api/v1/products`.
pub(crate) fn router(environment: &Environment) -> Router {
    let state = Page {
        environment: environment.clone(),
        caller: Caller::new(),
    };
    Router::new()
        .route(
            "/",
            get(|| async { Html("<h1>BookInfo Sample</h1><a href=\"/productpage\">Product page</a>") }),
        )
        .route("/index.html", get(|| async { Redirect::permanent("/") }))
        .route("/health", get(|| async { "Product page is healthy" }))
        .route("/login", post(login))
        .route("/logout", get(logout))
        .route("/productpage", get(product_page))
        .route("/api/v1/products", get(|| async { Json(json!([product()])) }))
        .route("/api/v1/products/{id}", get(api_details))
        .route("/api/v1/products/{id}/reviews", get(api_reviews))
        .route("/api/v1/products/{id}/ratings", get(api_ratings))
        .with_state(state)
}

fn product() -> Value {
    json!({
        "id": 0,
        "title": "The Comedy of Errors",
        "descriptionHtml": "<a href=\"https://en.wikipedia.org/wiki/The_Comedy_of_Errors\">Wikipedia Summary</a>: \
            The Comedy of Errors is one of <b>William Shakespeare's</b> early plays.",
    })
}

#[derive(Deserialize)]
struct Login {
    username: String,
}

async fn login(headers: HeaderMap, Form(login): Form<Login>) -> Response {
    let back = headers
        .get("referer")
        .and_then(|value| value.to_str().ok())
        .unwrap_or("/productpage");
    let user: String = login
        .username
        .chars()
        .filter(|c| c.is_ascii_alphanumeric())
        .take(64)
        .collect();
    let mut response = Redirect::to(back).into_response();
    if let Ok(cookie) = HeaderValue::from_str(&format!("session-user={user}; Path=/; HttpOnly")) {
        response.headers_mut().insert(SET_COOKIE, cookie);
    }
    response
}

async fn logout() -> Response {
    let mut response = Redirect::to("/productpage").into_response();
    response.headers_mut().insert(
        SET_COOKIE,
        HeaderValue::from_static("session-user=; Path=/; Max-Age=0"),
    );
    response
}

/// The headers to pass on, with `end-user` set for who is logged in.
fn with_user(mut headers: HeaderMap) -> HeaderMap {
    let user = headers
        .get(COOKIE)
        .and_then(|value| value.to_str().ok())
        .and_then(|cookies| {
            cookies
                .split(';')
                .find_map(|cookie| cookie.trim().strip_prefix("session-user="))
        })
        .and_then(|user| HeaderValue::from_str(user).ok());
    if let Some(user) = user.filter(|user| !user.is_empty()) {
        headers.insert("end-user", user);
    }
    headers
}

impl Page {
    async fn details(&self, id: &str, headers: &HeaderMap) -> (StatusCode, Value) {
        let answer = self
            .caller
            .get(
                &self.environment.details,
                &format!("/details/{id}"),
                headers,
                TIMEOUT,
            )
            .await;
        decode(
            answer,
            "Sorry, product details are currently unavailable for this book.",
        )
    }

    async fn reviews(&self, id: &str, headers: &HeaderMap) -> (StatusCode, Value) {
        let mut answer = None;
        for _ in 0..REVIEWS_ATTEMPTS {
            answer = self
                .caller
                .get(
                    &self.environment.reviews,
                    &format!("/reviews/{id}"),
                    headers,
                    TIMEOUT,
                )
                .await;
            if answer.as_ref().is_some_and(|(status, _)| status.is_success()) {
                break;
            }
        }
        decode(
            answer,
            "Sorry, product reviews are currently unavailable for this book.",
        )
    }

    async fn ratings(&self, id: &str, headers: &HeaderMap) -> (StatusCode, Value) {
        let answer = self
            .caller
            .get(
                &self.environment.ratings,
                &format!("/ratings/{id}"),
                headers,
                TIMEOUT,
            )
            .await;
        decode(
            answer,
            "Sorry, product ratings are currently unavailable for this book.",
        )
    }
}

fn decode(answer: Option<(StatusCode, bytes::Bytes)>, unavailable: &str) -> (StatusCode, Value) {
    match answer {
        Some((status, body)) if status.is_success() => match serde_json::from_slice(&body) {
            Ok(value) => (status, value),
            Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, json!({ "error": unavailable })),
        },
        Some((status, _)) => (status, json!({ "error": unavailable })),
        None => (StatusCode::INTERNAL_SERVER_ERROR, json!({ "error": unavailable })),
    }
}

async fn api_details(
    State(page): State<Page>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> impl IntoResponse {
    let (status, body) = page.details(&id, &with_user(headers)).await;
    (status, Json(body))
}

async fn api_reviews(
    State(page): State<Page>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> impl IntoResponse {
    let (status, body) = page.reviews(&id, &with_user(headers)).await;
    (status, Json(body))
}

async fn api_ratings(
    State(page): State<Page>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> impl IntoResponse {
    let (status, body) = page.ratings(&id, &with_user(headers)).await;
    (status, Json(body))
}

/// Answers 200 even when a part is missing, and says which: the page degrades, it does not fail.
async fn product_page(State(page): State<Page>, headers: HeaderMap) -> Html<String> {
    let headers = with_user(headers);
    let (details, reviews) = tokio::join!(page.details("0", &headers), page.reviews("0", &headers));
    let mut html =
        String::from("<!doctype html><title>Simple Bookstore App</title><h3>The Comedy of Errors</h3>");
    match details.1.get("error") {
        Some(error) => {
            let _ = write!(
                html,
                "<h4>Error fetching product details!</h4><p>{}</p>",
                error.as_str().unwrap_or("")
            );
        }
        None => {
            html.push_str("<h4>Book Details</h4><dl>");
            for name in ["type", "pages", "publisher", "language", "ISBN-10", "ISBN-13"] {
                let _ = write!(html, "<dt>{name}</dt><dd>{}</dd>", text(&details.1[name]));
            }
            html.push_str("</dl>");
        }
    }
    match reviews.1["reviews"].as_array() {
        None => {
            let error = reviews.1["error"].as_str().unwrap_or("");
            let _ = write!(html, "<h4>Error fetching product reviews!</h4><p>{error}</p>");
        }
        Some(list) => {
            html.push_str("<h4>Book Reviews</h4>");
            for review in list {
                let _ = write!(
                    html,
                    "<blockquote><p>{}</p><small>{}</small></blockquote>",
                    text(&review["text"]),
                    text(&review["reviewer"])
                );
                if let Some(error) = review.pointer("/rating/error") {
                    let _ = write!(html, "<p><i>{}</i></p>", text(error));
                } else if let Some(rating) = review.get("rating") {
                    let stars = "★".repeat(rating["stars"].as_u64().unwrap_or(0).min(5) as usize);
                    let _ = write!(html, "<font color=\"{}\">{stars}</font>", text(&rating["color"]));
                }
            }
            let _ = write!(html, "<p>Reviews served by: {}</p>", text(&reviews.1["podname"]));
        }
    }
    Html(html)
}

/// A JSON scalar as text that is safe inside HTML.
fn text(value: &Value) -> String {
    let raw = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    raw.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_logged_in_is_passed_on_as_end_user() {
        let mut headers = HeaderMap::new();
        headers.insert(COOKIE, HeaderValue::from_static("a=b; session-user=jason"));
        assert_eq!(with_user(headers)["end-user"], "jason");
        assert!(with_user(HeaderMap::new()).get("end-user").is_none());
    }

    #[tokio::test]
    async fn the_page_says_which_part_is_missing_and_still_answers() {
        let environment = Environment {
            details: "127.0.0.1:1".to_owned(),
            reviews: "127.0.0.1:1".to_owned(),
            ..Environment::default()
        };
        let state = Page {
            environment,
            caller: Caller::new(),
        };
        let Html(html) = product_page(State(state), HeaderMap::new()).await;
        assert!(html.contains("Error fetching product details!"));
        assert!(html.contains("product reviews are currently unavailable"));
    }

    #[test]
    fn text_from_other_services_cannot_become_markup() {
        assert_eq!(text(&json!("<b>\"&")), "&lt;b&gt;&quot;&amp;");
    }
}
