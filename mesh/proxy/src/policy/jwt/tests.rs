use aws_lc_rs::signature::{self, KeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::{HeaderMap, HeaderValue, header};
use serde_json::{Value, json};
use serin_xds::pb::envoy::r#type::matcher::v3::{StringMatcher, string_matcher::MatchPattern};

use super::keys::KeySet;
use super::token::{Failure, Token};
use super::*;
use crate::policy::metadata::Metadata;

fn part(value: &Value) -> String {
    URL_SAFE_NO_PAD.encode(value.to_string())
}

fn signed(header: &Value, claims: &Value, sign: impl Fn(&[u8]) -> Vec<u8>) -> String {
    let message = format!("{}.{}", part(header), part(claims));
    let signature = URL_SAFE_NO_PAD.encode(sign(message.as_bytes()));
    format!("{message}.{signature}")
}

struct EcKey {
    pair: signature::EcdsaKeyPair,
    random: aws_lc_rs::rand::SystemRandom,
}

impl EcKey {
    fn new() -> Self {
        Self {
            pair: signature::EcdsaKeyPair::generate(&signature::ECDSA_P256_SHA256_FIXED_SIGNING).unwrap(),
            random: aws_lc_rs::rand::SystemRandom::new(),
        }
    }

    fn jwk(&self, id: &str) -> Value {
        let point = self.pair.public_key().as_ref();
        json!({
            "kty": "EC", "crv": "P-256", "kid": id, "alg": "ES256",
            "x": URL_SAFE_NO_PAD.encode(&point[1..33]), "y": URL_SAFE_NO_PAD.encode(&point[33..]),
        })
    }

    fn token(&self, id: &str, claims: &Value) -> String {
        signed(&json!({"alg": "ES256", "kid": id}), claims, |message| {
            self.pair.sign(&self.random, message).unwrap().as_ref().to_vec()
        })
    }
}

fn keys(keys: &[Value]) -> Arc<KeySet> {
    Arc::new(KeySet::parse(json!({ "keys": keys }).to_string().as_bytes()).unwrap())
}

fn provider(message: &jwt::JwtProvider) -> Provider {
    let mut slots = crate::config::slot::Slots::default();
    let mut context = Context {
        slots: &mut slots,
        workers: 1,
        seed: 0,
    };
    let mut message = message.clone();
    message.jwks_source_specifier = Some(jwt::jwt_provider::JwksSourceSpecifier::LocalJwks(
        serin_xds::pb::envoy::config::core::v3::DataSource {
            specifier: Some(
                serin_xds::pb::envoy::config::core::v3::data_source::Specifier::InlineString(
                    json!({"keys": [EcKey::new().jwk("k")]}).to_string(),
                ),
            ),
            ..Default::default()
        },
    ));
    Provider::compile("p", &message, &mut context).unwrap()
}

#[test]
fn signatures_of_every_algorithm_are_verified_and_changed_ones_refused() {
    let claims = json!({"iss": "me"});
    let ec = EcKey::new();
    let ed = signature::Ed25519KeyPair::generate().unwrap();
    let rsa = aws_lc_rs::rsa::KeyPair::generate(aws_lc_rs::rsa::KeySize::Rsa2048).unwrap();
    let random = aws_lc_rs::rand::SystemRandom::new();
    // The end of an RSAPublicKey in DER: 256 bytes of modulus, then the exponent 65537 as an INTEGER of 3 bytes.
    let der = rsa.public_key().as_ref();
    let modulus = &der[der.len() - 5 - 256..der.len() - 5];
    let rsa_jwk = json!({"kty": "RSA", "kid": "r", "n": URL_SAFE_NO_PAD.encode(modulus), "e": "AQAB"});
    let ed_jwk =
        json!({"kty": "OKP", "crv": "Ed25519", "kid": "o", "x": URL_SAFE_NO_PAD.encode(ed.public_key())});
    let secret_jwk = json!({"kty": "oct", "kid": "h", "k": URL_SAFE_NO_PAD.encode("secret")});
    let all = keys(&[
        ec.jwk("e"),
        rsa_jwk,
        ed_jwk,
        secret_jwk,
        json!({"kty": "strange"}),
    ]);
    let with_rsa = |name: &'static str, encoding: &'static dyn signature::RsaEncoding| {
        signed(&json!({"alg": name, "kid": "r"}), &claims, |message| {
            let mut out = vec![0; rsa.public_modulus_len()];
            rsa.sign(encoding, &random, message, &mut out).unwrap();
            out
        })
    };
    let hmac_key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, b"secret");
    let tokens = [
        ec.token("e", &claims),
        with_rsa("RS256", &signature::RSA_PKCS1_SHA256),
        with_rsa("RS512", &signature::RSA_PKCS1_SHA512),
        with_rsa("PS256", &signature::RSA_PSS_SHA256),
        with_rsa("PS384", &signature::RSA_PSS_SHA384),
        signed(&json!({"alg": "EdDSA", "kid": "o"}), &claims, |message| {
            ed.sign(message).as_ref().to_vec()
        }),
        signed(&json!({"alg": "HS256", "kid": "h"}), &claims, |message| {
            aws_lc_rs::hmac::sign(&hmac_key, message).as_ref().to_vec()
        }),
    ];
    for text in tokens {
        let token = Token::parse(&text).unwrap();
        assert_eq!(token.check_signature(&all), Ok(()), "{:?}", token.algorithm);
        let mut parts: Vec<String> = text.split('.').map(str::to_owned).collect();
        parts[1] = part(&json!({"iss": "you"}));
        let forged = Token::parse(&parts.join(".")).unwrap();
        assert_eq!(
            forged.check_signature(&all),
            Err(Failure::Verification),
            "{:?}",
            token.algorithm
        );
    }
    // A public key must never serve as a secret: the algorithm follows from the key's kind.
    let confused = signed(&json!({"alg": "HS256", "kid": "e"}), &claims, |message| {
        message.to_vec()
    });
    assert_eq!(
        Token::parse(&confused).unwrap().check_signature(&all),
        Err(Failure::NoKey)
    );
    let unsigned = format!("{}.{}.", part(&json!({"alg": "none"})), part(&claims));
    assert_eq!(Token::parse(&unsigned).unwrap_err(), Failure::Algorithm);
    let unknown = ec.token("other", &claims);
    assert_eq!(
        Token::parse(&unknown).unwrap().check_signature(&all),
        Err(Failure::NoKey)
    );
}

#[test]
fn issuer_times_audiences_and_subjects_are_checked() {
    let provider = provider(&jwt::JwtProvider {
        issuer: "me".into(),
        audiences: vec!["https://api/".into()],
        ..Default::default()
    });
    let judge = |claims: Value| {
        let text = signed(&json!({"alg": "ES256"}), &claims, |_| vec![0; 64]);
        provider.read(&text, None, 10_000).map(|_| ())
    };
    let aud = || json!("api");
    assert_eq!(judge(json!({"iss": "me", "aud": aud()})), Ok(()));
    assert_eq!(judge(json!({"iss": "me", "aud": ["x", "http://api"]})), Ok(()));
    assert_eq!(
        judge(json!({"iss": "you", "aud": aud()})),
        Err(Failure::UnknownIssuer)
    );
    assert_eq!(
        judge(json!({"iss": "me", "aud": "other"})),
        Err(Failure::Audience)
    );
    assert_eq!(judge(json!({"iss": "me"})), Err(Failure::Audience));
    assert_eq!(
        judge(json!({"iss": "me", "aud": aud(), "exp": 9_941})),
        Ok(()),
        "within the allowance"
    );
    assert_eq!(
        judge(json!({"iss": "me", "aud": aud(), "exp": 9_939})),
        Err(Failure::Expired)
    );
    assert_eq!(
        judge(json!({"iss": "me", "aud": aud(), "nbf": 10_061})),
        Err(Failure::NotYet)
    );
    assert_eq!(
        judge(json!({"iss": "me", "aud": aud(), "exp": -1})),
        Err(Failure::TimeType)
    );
    assert_eq!(judge(json!({"iss": 1})), Err(Failure::IssuerType));
}

#[test]
fn tokens_that_live_too_long_or_for_ever_and_those_of_others_fail_as_wrong_signatures_do() {
    let judge = |message: &jwt::JwtProvider, claims: Value| {
        let text = signed(&json!({"alg": "ES256"}), &claims, |_| vec![0; 64]);
        provider(message).read(&text, None, 10_000).map(|_| ())
    };
    let seconds = |seconds| serin_xds::pb::google::protobuf::Duration { seconds, nanos: 0 };
    let short = jwt::JwtProvider {
        max_lifetime: Some(seconds(100)),
        ..Default::default()
    };
    let old = json!({"nbf": 1, "iat": 1, "exp": 10_100});
    assert_eq!(judge(&short, old), Ok(()), "what is left of it counts");
    assert_eq!(judge(&short, json!({"exp": 10_101})), Err(Failure::Verification));
    let ending = jwt::JwtProvider {
        require_expiration: true,
        ..Default::default()
    };
    for message in [&short, &ending] {
        assert_eq!(judge(message, json!({})), Err(Failure::Verification));
        assert_eq!(judge(message, json!({"exp": 0})), Err(Failure::Verification));
    }
    assert_eq!(judge(&ending, json!({"exp": 4_000_000_000u64})), Ok(()));
    let bobs = jwt::JwtProvider {
        subjects: Some(StringMatcher {
            match_pattern: Some(MatchPattern::Exact("bob".into())),
            ..Default::default()
        }),
        audiences: vec!["a".into()],
        ..Default::default()
    };
    assert_eq!(judge(&bobs, json!({"sub": "bob", "aud": "a"})), Ok(()));
    let other = json!({"sub": "eve", "aud": "a"});
    assert_eq!(judge(&bobs, other), Err(Failure::Verification));
    let both = json!({"sub": "eve", "aud": "b"});
    assert_eq!(judge(&bobs, both), Err(Failure::Audience), "that is told first");
}

#[test]
fn tokens_are_found_in_fields_parameters_and_cookies() {
    let mut headers = HeaderMap::new();
    headers.insert("authorization", "Bearer a.b.c".parse().unwrap());
    headers.insert("x-token", "JWT \"d.e.f".parse().unwrap());
    headers.insert("cookie", "x=1; session=\"g.h.i\"; y=2".parse().unwrap());
    let texts = |message: &jwt::JwtProvider, query: Option<&str>| {
        provider(message)
            .places
            .find(&headers, query)
            .into_iter()
            .map(|found| found.text)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        texts(&jwt::JwtProvider::default(), Some("access_token=q.r.s&z=1")),
        ["a.b.c", "q.r.s"]
    );
    let elsewhere = jwt::JwtProvider {
        from_headers: vec![jwt::JwtHeader {
            name: "x-token".into(),
            value_prefix: "JWT ".into(),
        }],
        from_params: vec!["t".into()],
        from_cookies: vec!["session".into()],
        ..Default::default()
    };
    assert_eq!(
        texts(&elsewhere, Some("access_token=q.r.s&t=j.k.l")),
        ["d.e.f", "j.k.l", "g.h.i"]
    );
    assert_eq!(
        texts(&elsewhere, Some("t=first&t=%73econd&t"))[1..4],
        ["", "second", "first"],
        "all of them, the first one last"
    );
}

#[test]
fn what_stands_beside_a_token_in_its_field_is_not_left_out_of_it() {
    let provider = provider(&jwt::JwtProvider::default());
    let texts = |values: &[&str]| {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append("authorization", value.parse().unwrap());
        }
        let found = provider.places.find(&headers, None);
        found.into_iter().map(|found| found.text).collect::<Vec<_>>()
    };
    assert_eq!(texts(&["Bearer a.b.c"]), ["a.b.c"]);
    assert_eq!(texts(&["Bearer a.b.c, d"]), ["a.b.c, d"]);
    assert_eq!(texts(&["Bearer a.b.c", "Bearer d.e.f"]), ["a.b.c,Bearer d.e.f"]);
    assert_eq!(texts(&["Bearer "]), ["Bearer "], "no token, and not none");
    assert!(texts(&["Basic x"]).is_empty());
}

#[test]
fn a_good_token_becomes_fields_and_metadata_and_leaves_the_request() {
    let provider = provider(&jwt::JwtProvider {
        forward_payload_header: "x-payload".into(),
        payload_in_metadata: "payload".into(),
        claim_to_headers: [("x-sub", "sub"), ("x-deep", "a.b"), ("x-list", "l")]
            .into_iter()
            .map(|(header, claim)| jwt::JwtClaimToHeader {
                header_name: header.into(),
                claim_name: claim.into(),
                ..Default::default()
            })
            .collect(),
        normalize_payload_in_metadata: Some(jwt::jwt_provider::NormalizePayload {
            space_delimited_claims: vec!["scope".into()],
        }),
        ..Default::default()
    });
    let claims = json!({"sub": "bob", "a": {"b": 7}, "l": [1], "scope": "read write"});
    let text = signed(&json!({"alg": "ES256"}), &claims, |_| vec![0; 64]);
    let token = Token::parse(&text).unwrap();
    let mut headers = HeaderMap::new();
    headers.insert("authorization", format!("Bearer {text}").parse().unwrap());
    headers.insert("x-sub", "eve".parse().unwrap());
    provider.sanitize(&mut headers);
    let mut metadata = Metadata::default();
    let place = Place::Header(&header::AUTHORIZATION);
    provider.accept(&token, place, &mut headers, None, &mut metadata);
    assert!(!headers.contains_key("authorization"));
    assert_eq!(
        (&headers["x-sub"], &headers["x-deep"], &headers["x-list"]),
        (
            &HeaderValue::from_static("bob"),
            &HeaderValue::from_static("7"),
            &HeaderValue::from_str(&URL_SAFE_NO_PAD.encode("[1]")).unwrap()
        )
    );
    assert_eq!(headers["x-payload"].to_str().unwrap(), part(&claims));
    let scope = metadata.find(NAMESPACE, ["payload", "scope"]).unwrap();
    assert_eq!(crate::policy::metadata::to_json(scope), json!(["read", "write"]));
    let query = provider.accept(
        &token,
        Place::Parameter("access_token"),
        &mut headers,
        Some("a=1&access_token=x&b=2"),
        &mut metadata,
    );
    assert_eq!(query.as_deref(), Some("a=1&b=2"));
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(128))]
    #[test]
    fn any_text_is_read_without_panic(text in "[A-Za-z0-9_.=-]{0,80}", free in ".{0,40}") {
        let _ = Token::parse(&text);
        let _ = Token::parse(&free);
        let _ = KeySet::parse(free.as_bytes());
    }
}
