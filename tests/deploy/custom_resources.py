"""What the published schemas of the custom resources in deploy/kubernetes demand, as far as our manifests use them.

The schemas themselves cannot be had from a package registry, so these are small ones of our own, written from the API
references: kinds and versions, required fields, types, and no field that is not here (a misspelt one is an error).
"""

TEXT = {"type": "string", "minLength": 1}
LABELS = {"type": "object", "additionalProperties": TEXT, "minProperties": 1}
DURATION = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}


def thing(required, **optional):
    """An object with these fields and no others."""
    return {
        "type": "object",
        "properties": {**required, **optional},
        "required": list(required),
        "additionalProperties": False,
    }


def several(items):
    return {"type": "array", "items": items, "minItems": 1}


SELECTOR = thing({"matchLabels": LABELS})
PATH_MATCH = thing({"path": thing({"type": {"enum": ["Exact", "PathPrefix"]}, "value": {"type": "string", "pattern": "^/"}})})
BACKEND = thing({"name": TEXT}, group={"type": "string"}, kind=TEXT, port=PORT)
# The API wants a port wherever the backend is a Service.
BACKEND_WITH_PORT = {**BACKEND, "if": {"not": {"required": ["kind"]}}, "then": {"required": ["port"]}}

SPECS = {
    ("gateway.networking.k8s.io/v1", "Gateway"): thing({
        "gatewayClassName": TEXT,
        "listeners": several(thing(
            {"name": TEXT, "port": PORT, "protocol": {"enum": ["HTTP", "HTTPS", "TLS", "TCP", "UDP"]}},
            hostname=TEXT,
            tls=thing({"mode": {"enum": ["Terminate", "Passthrough"]}, "certificateRefs": several(thing({"name": TEXT}, kind=TEXT))}),
            allowedRoutes=thing({"namespaces": thing({"from": {"enum": ["All", "Selector", "Same"]}})}),
        )),
    }),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): thing({
        "parentRefs": several(thing({"name": TEXT}, sectionName=TEXT)),
        "rules": several(thing(
            {"backendRefs": several(BACKEND_WITH_PORT)},
            matches=several(PATH_MATCH),
            timeouts=thing({}, request=DURATION, backendRequest=DURATION),
        )),
    }, hostnames=several(TEXT)),
    ("inference.networking.k8s.io/v1", "InferencePool"): thing({
        "selector": SELECTOR,
        "targetPorts": {**several(thing({"number": PORT})), "maxItems": 8},
        "endpointPickerRef": thing({"name": TEXT, "port": thing({"number": PORT})},
                                   failureMode={"enum": ["FailOpen", "FailClose"]}),
    }),
    ("keda.sh/v1alpha1", "ScaledObject"): thing(
        {
            "scaleTargetRef": thing({"name": TEXT}),
            "triggers": several(thing({
                "type": {"const": "prometheus"},
                "metadata": thing({"serverAddress": TEXT, "query": TEXT, "threshold": TEXT}),
            })),
        },
        minReplicaCount={"type": "integer"}, maxReplicaCount={"type": "integer"},
        pollingInterval={"type": "integer"},
        fallback=thing({"failureThreshold": {"type": "integer"}, "replicas": {"type": "integer"}},
                       behavior={"enum": ["static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"]}),
        advanced=thing({"horizontalPodAutoscalerConfig": {"type": "object"}}),
    ),
    ("monitoring.coreos.com/v1", "ServiceMonitor"): thing(
        {
            "selector": SELECTOR,
            "endpoints": several(thing({"port": TEXT}, path=TEXT, interval=DURATION, scrapeTimeout=DURATION)),
        },
        jobLabel=TEXT,
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): thing({
        "groups": several(thing({"name": TEXT, "rules": several(thing(
            {"expr": TEXT}, record=TEXT, alert=TEXT, labels=LABELS, annotations=LABELS, **{"for": DURATION},
        ))})),
    }),
}

PLUGIN_REF = thing({"pluginRef": TEXT}, weight={"type": "number", "minimum": 0}, extractors=several(thing({"pluginRef": TEXT})))
PICKER_CONFIG = thing(
    {
        "apiVersion": {"const": "llm-d.ai/v1alpha1"},
        "kind": {"const": "EndpointPickerConfig"},
        "plugins": several(thing({"type": TEXT}, name=TEXT, parameters={"type": "object"})),
        "schedulingProfiles": several(thing({"name": TEXT, "plugins": several(PLUGIN_REF)})),
    },
    dataLayer=thing({"sources": several(PLUGIN_REF)}),
)
