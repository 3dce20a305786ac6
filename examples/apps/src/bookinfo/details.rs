//! Details of a book.

use axum::extract::Path;
use axum::routing::get;
use axum::{Json, Router};
use http::StatusCode;
use serde_json::{Value, json};

/// `/health` and `/details/{id}`.
pub(crate) fn router() -> Router {
    Router::new()
        .route(
            "/health",
            get(|| async { Json(json!({ "status": "Details is healthy" })) }),
        )
        .route("/details/{id}", get(details))
}

async fn details(Path(id): Path<String>) -> (StatusCode, Json<Value>) {
    let Ok(id) = id.parse::<i64>() else {
        return (
            StatusCode::BAD_REQUEST,
            Json(json!({ "error": "please provide numeric product id" })),
        );
    };
    let book = json!({
        "id": id,
        "author": "William Shakespeare",
        "year": 1595,
        "type": "paperback",
        "pages": 200,
        "publisher": "PublisherA",
        "language": "English",
        "ISBN-10": "1234567890",
        "ISBN-13": "123-1234567890",
    });
    (StatusCode::OK, Json(book))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_product_id_that_is_not_a_number_is_refused() {
        assert_eq!(details(Path("x".to_owned())).await.0, StatusCode::BAD_REQUEST);
        let (status, Json(book)) = details(Path("7".to_owned())).await;
        assert_eq!((status, &book["id"]), (StatusCode::OK, &json!(7)));
    }
}
