//! Tests of accepted configs and their values, and of the errors for the others.

use proptest::prelude::*;
use serde_json::json;

use super::*;

const TINY: &str = include_str!("../../../tests/golden/tiny/config.json");

/// The golden config, re-saved by several versions of transformers
/// (`tests/golden/make_configs.py`).
const SAVED: [(&str, &str); 4] = [
    ("4.40.2", include_str!("../../../tests/golden/configs/4.40.2.json")),
    ("4.49.0", include_str!("../../../tests/golden/configs/4.49.0.json")),
    ("4.57.6", include_str!("../../../tests/golden/configs/4.57.6.json")),
    ("5.24.0", include_str!("../../../tests/golden/configs/5.24.0.json")),
];

/// The golden config with one field, by JSON pointer, replaced or added.
fn with(pointer: &str, value: Value) -> Result<ModelConfig, ConfigError> {
    let mut root: Value = serde_json::from_str(TINY).unwrap();
    let (parent, field) = pointer.rsplit_once('/').unwrap();
    root.pointer_mut(parent).unwrap()[field] = value;
    ModelConfig::from_json(&root.to_string())
}

#[test]
fn the_golden_config_reads_with_class_defaults() {
    let config = ModelConfig::from_json(TINY).unwrap();
    assert_eq!((config.context, config.num_frames), (3072, 4));
    assert_eq!((config.vision.num_patches(), config.vision.num_channels), (16, 3));
    assert_eq!((config.text.rms_norm_eps, config.text.rope_theta, config.text.head_dim()), (1e-6, 1e6, 16));
    assert_eq!((config.connector.kind, config.connector.group), (ConnectorKind::Group, 4));
}

#[test]
fn left_out_values_are_the_class_defaults() {
    let text = json!({
        "connector_type": "naiveresampler", "num_queries": 512, "num_resampler_layers": 3,
        "text_config": {}, "vision_config": {},
    });
    let config = ModelConfig::from_json(&text.to_string()).unwrap();
    let (vision, text) = (&config.vision, &config.text);
    assert_eq!((vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers), (768, 3072, 12));
    assert_eq!((vision.image_size, vision.patch_size, vision.layer_norm_eps), (224, 16, 1e-6));
    assert_eq!((text.hidden_size, text.intermediate_size, text.num_hidden_layers), (4096, 22_016, 32));
    assert_eq!((text.vocab_size, text.rope_theta, text.tie_word_embeddings), (151_936, 1e4, false));
    assert_eq!((config.connector.group, config.num_frames, config.context), (1, 16, 2048));
}

#[test]
fn a_tokenizer_without_a_length_leaves_the_positions_of_the_decoder() {
    assert_eq!(with("/tokenizer_model_max_length", json!(1e30)).unwrap().context, 32_768);
}

#[test]
fn what_is_not_supported_is_named() {
    for (pointer, value) in [
        ("/connector_type", json!("mlp2x_gelu")),
        ("/connector_type", json!(null)),
        ("/vision_feature_layer", json!(-1)),
        ("/vision_feature_select_strategy", json!("cls_patch")),
        ("/image_aspect_ratio", json!("anyres")),
        ("/image_token_index", json!(32_000)),
        ("/model_type", json!("llava")),
        ("/quantization_config", json!({"bits": 4})),
        ("/group", json!(null)),
        ("/group", json!(3)),
        ("/num_queries", json!("many")),
        ("/hidden_size", json!(65)),
        ("/vision_hidden_size", json!(65)),
        ("/tokenizer_model_max_length", json!(-1)),
        ("/text_config", json!(null)),
        ("/text_config/model_type", json!("llama")),
        ("/text_config/hidden_act", json!("gelu")),
        ("/text_config/use_sliding_window", json!(true)),
        ("/text_config/rope_scaling", json!({"type": "yarn"})),
        ("/text_config/num_attention_heads", json!(5)),
        ("/text_config/num_attention_heads", json!(0)),
        ("/text_config/num_key_value_heads", json!(3)),
        ("/text_config/head_dim", json!(32)),
        ("/text_config/num_hidden_layers", json!(1e9)),
        ("/text_config/rope_theta", json!(0)),
        ("/text_config/tie_word_embeddings", json!("yes")),
        ("/vision_config", json!([])),
        ("/vision_config/model_type", json!("clip_vision_model")),
        ("/vision_config/hidden_act", json!("quick_gelu")),
        ("/vision_config/num_channels", json!(1)),
        ("/vision_config/num_attention_heads", json!(7)),
        ("/vision_config/patch_size", json!(64)),
    ] {
        let error = with(pointer, value.clone()).expect_err(pointer).to_string();
        let field = pointer.rsplit('/').next().unwrap();
        assert!(error.starts_with("config.json") && error.contains(field), "{pointer} = {value}: {error}");
    }
}

#[test]
fn a_config_saved_by_any_version_of_transformers_is_the_same() {
    let expected = ModelConfig::from_json(TINY).unwrap();
    for (version, text) in SAVED {
        assert_eq!(ModelConfig::from_json(text).as_ref(), Ok(&expected), "{version}");
    }
    let newest: Value = serde_json::from_str(SAVED[3].1).unwrap();
    assert!(newest["text_config"].get("rope_theta").is_none(), "nothing but `rope_parameters` says theta");
}

/// Reads theta of the golden config after removing its `rope_theta` and adding the given fields.
fn theta(root_fields: Value, text_fields: Value) -> Result<f64, String> {
    let mut root: Value = serde_json::from_str(TINY).unwrap();
    root["text_config"].as_object_mut().unwrap().remove("rope_theta");
    for (pointer, fields) in [("", root_fields), ("/text_config", text_fields)] {
        let map = root.pointer_mut(pointer).unwrap().as_object_mut().unwrap();
        map.extend(fields.as_object().unwrap().clone());
    }
    let config = ModelConfig::from_json(&root.to_string());
    config.map(|config| config.text.rope_theta).map_err(|error| error.to_string())
}

#[test]
fn theta_is_read_wherever_it_is_kept() {
    let plain = json!({"rope_type": "default", "rope_theta": 5e5});
    for text in [
        json!({"rope_theta": 5e5}),
        json!({"rope_theta": 500_000}),
        json!({"rope_theta": 5e5, "rope_scaling": null, "rope_parameters": null}),
        json!({"rope_parameters": plain}),
        json!({"rope_parameters": {"rope_theta": 500_000}}),
        json!({"rope_parameters": plain, "rope_theta": 5e5}),
        json!({"rope_parameters": plain, "rope_theta": null}),
        json!({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}),
        json!({"rope_parameters": {"full_attention": plain}}),
        json!({"rope_parameters": {"full_attention": plain, "sliding_attention": null}}),
        json!({"rope_scaling": {"type": "default", "rope_theta": 5e5, "factor": 1.0}}),
        json!({"rope_scaling": {"rope_type": "default", "type": "default"}, "rope_theta": 5e5}),
    ] {
        assert_eq!(theta(json!({}), text.clone()), Ok(5e5), "{text}");
        assert_eq!(theta(json!({"rope_theta": 5e5}), text.clone()), Ok(5e5), "repeated beside {text}");
    }
    for text in [json!({}), json!({"rope_parameters": {"rope_type": "default"}})] {
        assert_eq!(theta(json!({}), text.clone()), Ok(1e4), "{text}: the default of the class");
    }
}

#[test]
fn theta_of_two_values_is_refused() {
    for (root, text) in [
        (json!({}), json!({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}})),
        (json!({}), json!({"rope_theta": 1e6, "rope_scaling": {"type": "default", "rope_theta": 1e4}})),
        (json!({}), json!({"rope_parameters": {"rope_theta": 1e6, "full_attention": {"rope_theta": 1e4}}})),
        (json!({"rope_theta": 1e4}), json!({"rope_theta": 1e6})),
        (json!({"rope_parameters": {"rope_theta": 1e6}}), json!({})),
    ] {
        let error = theta(root.clone(), text.clone()).unwrap_err();
        let expected = ["rope_theta` is 10", "1000000", " but "];
        assert!(expected.iter().all(|part| error.contains(part)), "{root} {text}: {error}");
    }
}

#[test]
fn other_rotary_positions_and_layers_are_refused_by_name() {
    for (text, expected) in [
        (
            json!({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}),
            "rope_type` is \"yarn\"",
        ),
        (json!({"rope_parameters": {"rope_type": "llama3"}}), "rope_type` is \"llama3\""),
        (json!({"rope_parameters": {"rope_type": "longrope"}}), "rope_type` is \"longrope\""),
        (json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}), "rope_type` is \"dynamic\""),
        (json!({"rope_scaling": {"type": "linear", "factor": 2.0}}), "type` is \"linear\""),
        (json!({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}), "type` is \"mrope\""),
        (
            json!({"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}),
            "mrope_section` is [16,24,24]",
        ),
        (json!({"rope_scaling": {"type": "default", "factor": 2.0}}), "rope_scaling.factor` is 2.0"),
        (json!({"rope_parameters": {"rope_type": 3}}), "rope_type` is 3"),
        (json!({"rope_parameters": "default"}), "rope_parameters` is \"default\""),
        (json!({"rope_parameters": {"rope_theta": 0}}), "rope_theta` is 0"),
        (json!({"rope_parameters": {"rope_theta": "1e6"}}), "rope_theta` is \"1e6\""),
        (json!({"rope_theta": null}), "rope_theta` is null"),
        (
            json!({"rope_parameters": {"full_attention": {"rope_type": "proportional"}}}),
            "full_attention.rope_type` is \"proportional\"",
        ),
        (
            json!({"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_theta": 1e4}}}),
            "sliding_attention` is {\"rope_theta\":10000.0}",
        ),
        (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor` is 0.5"),
        (json!({"use_sliding_window": true}), "use_sliding_window` is true"),
        (
            json!({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
            "layer_types` is \"sliding_attention\"",
        ),
        (
            json!({"layer_types": ["linear_attention", "linear_attention", "linear_attention"]}),
            "layer_types` is \"linear_attention\"",
        ),
        (json!({"layer_types": "full_attention"}), "layer_types` is \"full_attention\", expected a list"),
        (
            json!({"layer_types": ["full_attention"]}),
            "has 1 entries but `text_config.num_hidden_layers` is 3",
        ),
    ] {
        let error = theta(json!({}), text.clone()).expect_err(&text.to_string());
        assert!(
            error.starts_with("config.json: `text_config.") && error.contains(expected),
            "{text}: {error}"
        );
    }
}

#[test]
fn a_key_that_is_not_known_is_an_error_that_names_it() {
    for (pointer, value) in [
        ("/text_config/logit_softcapping", json!(30.0)),
        ("/text_config/use_qk_norm", json!(true)),
        ("/text_config/qk_layernorm", json!(false)),
        ("/text_config/embedding_multiplier", json!(12)),
        ("/text_config/num_experts", json!(8)),
        ("/vision_config/use_rope", json!(true)),
        ("/vision_config/rope_parameters", json!({"rope_theta": 100})),
        ("/mm_projector_type", json!("mlp")),
        ("/transformers_weights", json!("other.safetensors")),
    ] {
        let error = with(pointer, value.clone()).expect_err(pointer).to_string();
        let named =
            format!("`{}` is {value}, which this server does not know", pointer[1..].replace('/', "."));
        assert!(error.contains(&named) && error.contains("remove it"), "{error}");
        assert!(with(pointer, Value::Null).is_ok(), "{pointer}: null asks for nothing");
    }
    let error = with(&format!("/{}", "k".repeat(1000)), json!("v".repeat(1000))).unwrap_err().to_string();
    assert!(error.len() < 400, "{error}");
}

#[test]
fn a_key_that_is_harmless_at_some_values_is_refused_at_others() {
    for (pointer, harmless, harmful) in [
        ("/text_config/attention_bias", json!(true), json!(false)),
        ("/text_config/mlp_bias", json!(false), json!(true)),
        ("/text_config/partial_rotary_factor", json!(1.0), json!(0.25)),
        ("/text_config/per_layer_config", json!({}), json!({"3": {"sliding_window": 128}})),
        ("/text_config/quantization_config", json!(null), json!({"bits": 4})),
        ("/text_config/pruned_heads", json!({}), json!({"0": [1]})),
        ("/text_config/add_cross_attention", json!(false), json!(true)),
        ("/text_config/is_encoder_decoder", json!(false), json!(true)),
        ("/vision_config/pruned_heads", json!({}), json!({"2": [0, 3]})),
        ("/vision_config/quantization_config", json!({}), json!({"load_in_8bit": true})),
        ("/mm_use_im_start_end", json!(false), json!(true)),
        ("/image_aspect_ratio", json!("pad"), json!("anyres")),
    ] {
        assert!(with(pointer, harmless).is_ok(), "{pointer}");
        let error = with(pointer, harmful.clone()).expect_err(pointer).to_string();
        assert!(error.contains(&format!("`{}` is {harmful}", pointer[1..].replace('/', "."))), "{error}");
    }
    for (pointer, value) in [
        ("/text_config/attention_dropout", json!(0.1)),
        ("/text_config/sliding_window", json!(4096)),
        ("/text_config/initializer_range", json!(0.5)),
        ("/vision_config/vision_use_head", json!(false)),
        ("/tune_type_llm", json!("lora")),
        ("/tokenizer_padding_side", json!("left")),
        ("/text_config/temperature", json!(0.7)),
    ] {
        assert_eq!(with(pointer, value), with("/use_cache", json!(true)), "{pointer}");
    }
}

#[test]
fn a_null_means_what_the_original_takes_it_for() {
    let heads = with("/text_config/num_key_value_heads", json!(null)).unwrap().text;
    assert_eq!(heads.num_key_value_heads, heads.num_attention_heads);
    assert_eq!(with("/tokenizer_model_max_length", json!(null)).unwrap().context, 32_768);
    for pointer in ["/text_config/rms_norm_eps", "/vision_config/layer_norm_eps"] {
        let error = with(pointer, json!(null)).unwrap_err().to_string();
        assert!(error.contains("_eps` is null, expected a positive number"), "{error}");
    }
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-3i64..40).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z_]{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 8, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::btree_map("[a-z]{1,4}", inner, 0..3)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn mutated_configs_never_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any_json()), 1..4),
        removed in prop::collection::vec(any::<prop::sample::Index>(), 0..3),
    ) {
        let mut root: Value = serde_json::from_str(TINY).unwrap();
        for (index, value) in edits {
            let part = match index.index(3) { 0 => "", 1 => "/text_config", _ => "/vision_config" };
            if let Some(map) = root.pointer_mut(part).and_then(Value::as_object_mut) && !map.is_empty() {
                let key = map.keys().nth(index.index(map.len())).unwrap().clone();
                map.insert(key, value);
            }
        }
        for index in removed {
            let map = root.as_object_mut().unwrap();
            let key = map.keys().nth(index.index(map.len())).unwrap().clone();
            map.remove(&key);
        }
        if let Ok(config) = ModelConfig::from_json(&root.to_string()) {
            // What is accepted can be counted and divided without overflow.
            prop_assert!(config.num_parameters() > 0);
            prop_assert_eq!(config.text.head_dim() * config.text.num_attention_heads, config.text.hidden_size);
        }
    }

    #[test]
    fn mutilated_text_never_panics(cut in 0..TINY.trim_end().len(), byte in any::<u8>()) {
        let mut bytes = TINY.as_bytes().to_vec();
        bytes[cut] = byte;
        let text = String::from_utf8_lossy(&bytes);
        let _ = ModelConfig::from_json(&text);
        prop_assert!(ModelConfig::from_json(&TINY[..cut]).is_err());
    }
}
