package install_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/fathom-network/fathom/internal/testenv"
)

const (
	own    = "/apis/fathom.network/v1alpha1"
	system = "/api/v1/namespaces/fathom-system"
	apply  = "application/apply-patch+yaml"
	merge  = "application/strategic-merge-patch+json"
)

// misuse is a request that is to be refused.
type misuse struct {
	method, path string
	kind         string // of the body; empty is JSON, or a merge patch
	body         string
	want         string // in the answer
}

// attempt is a misuse by somebody.
type attempt struct {
	misuse
	who string
	by  *caller
}

func (a attempt) name() string { return strings.Join([]string{a.who, a.method, a.path, a.body}, " ") }

func misusesBy(who string, by *caller, list []misuse) []attempt {
	var all []attempt
	for _, m := range list {
		all = append(all, attempt{m, who, by})
	}
	return all
}

func quantity(s string) resource.Quantity { return resource.MustParse(s) }

// onNode is a patch of the status of node-a, which is the agent's own.
func onNode(body, want string) misuse {
	return misuse{http.MethodPatch, "/api/v1/nodes/node-a/status", merge, body, want}
}

// event is one that the agent of node-a could send, but for what is changed.
func event(account, host, about, more, want string) misuse {
	return misuse{http.MethodPost, "/api/v1/namespaces/default/events", "", fmt.Sprintf(`{"apiVersion": "v1", "kind": "Event", "metadata": {"generateName": "x.", "namespace": "default"%s}, "reason": "Test", "type": "Normal",
		"involvedObject": %s, "source": {"component": %q, "host": %q}, "reportingComponent": %[3]q, "reportingInstance": %[4]q}`, more, about, account, host), want}
}

// because gives an event a reason.
func because(reason string, m misuse) misuse {
	m.body = strings.Replace(m.body, `"reason": "Test"`, fmt.Sprintf(`"reason": %q`, reason), 1)
	return m
}

// takeEvent makes an event that is there one that the account could have sent.
func takeEvent(name, account, host, want string) misuse {
	return misuse{http.MethodPatch, "/api/v1/namespaces/default/events/" + name, merge,
		fmt.Sprintf(`{"message": "all is well", "source": {"component": %q, "host": %q}, "reportingComponent": %[1]q, "reportingInstance": %[2]q}`, account, host), want}
}

// ipBlock is a request for a block.
func ipBlock(name, cidr, node, owners, more, want string) misuse {
	return misuse{http.MethodPost, own + "/ipblocks", "", fmt.Sprintf(`{"apiVersion": "fathom.network/v1alpha1", "kind": "IPBlock", "metadata": {"name": %q%s}, "spec": {"pool": "public", "cidr": %q, "node": %q%s}}`,
		name, owners, cidr, node, more), want}
}

const (
	ownedByA = `, "ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": "node-a", "uid": "1-2"}]`
	noRight  = "cannot "
)

// agentMisuses are tried by the agent of node-a.
var agentMisuses = []misuse{
	{http.MethodPatch, "/api/v1/nodes/node-b/status", merge, `{"metadata": {"annotations": {"fathom.network/mode": "vxlan"}}}`, "the agent of node node-a changes its own Node only"},
	{http.MethodPatch, "/api/v1/nodes/node-b/status", merge, `{"status": {"conditions": [{"type": "NetworkUnavailable", "status": "False"}]}}`, "the agent of node node-a changes its own Node only"},
	{http.MethodPatch, "/api/v1/nodes/node-b/status", merge, `{"metadata": {"labels": {"node-role.kubernetes.io/control-plane": ""}}}`, "its own Node only"},
	onNode(`{"metadata": {"labels": {"node-role.kubernetes.io/control-plane": ""}}}`, "and not metadata.labels"),
	onNode(`{"metadata": {"labels": null}}`, "and not metadata.labels"),
	onNode(`{"metadata": {"finalizers": ["example.com/mine"]}}`, "and not metadata.finalizers"),
	onNode(`{"metadata": {"finalizers": null}}`, "and not metadata.finalizers"),
	onNode(`{"metadata": {"ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "x", "uid": "1-2"}]}}`, "and not metadata.ownerReferences"),
	onNode(`{"metadata": {"annotations": {"example.com/owner": "me"}}}`, "and not annotation example.com/owner"),
	onNode(`{"metadata": {"annotations": {"example.com/owner": null}}}`, "and not annotation example.com/owner"),
	onNode(`{"metadata": {"annotations": {"volumes.kubernetes.io/controller-managed-attach-detach": "true", "fathom.network/mode": "auto"}}}`, "and not annotation volumes.kubernetes.io/controller-managed-attach-detach"),
	onNode(`{"status": {"addresses": [{"type": "InternalIP", "address": "10.1.1.1"}]}}`, "and not status.addresses"),
	onNode(`{"status": {"daemonEndpoints": {"kubeletEndpoint": {"Port": 4444}}}}`, "and not status.daemonEndpoints"),
	onNode(`{"status": {"capacity": {"cpu": "64"}}}`, "and not status.capacity"),
	onNode(`{"status": {"allocatable": {"cpu": "64"}}}`, "and not status.allocatable"),
	onNode(`{"status": {"images": [{"names": ["registry.example/a:1"], "sizeBytes": 2}]}}`, "and not status.images"),
	onNode(`{"status": {"nodeInfo": {"kubeletVersion": "v1.0.0"}}}`, "and not status.nodeInfo"),
	onNode(`{"status": {"volumesInUse": null}}`, "and not status.volumesInUse"),
	onNode(`{"status": {"volumesAttached": [{"name": "example.com/v", "devicePath": "/dev/x"}]}}`, "and not status.volumesAttached"),
	onNode(`{"status": {"phase": "Terminated"}}`, "and not status.phase"),
	onNode(`{"status": {"conditions": [{"type": "Ready", "status": "False"}]}}`, "and not condition Ready"),
	onNode(`{"status": {"conditions": [{"type": "DiskPressure", "$patch": "delete"}]}}`, "and not condition DiskPressure"),
	onNode(`{"status": {"conditions": [{"type": "example.com/Broken", "status": "True"}]}}`, "and not condition example.com/Broken"),
	{http.MethodPatch, "/api/v1/nodes/node-a", "", `{"spec": {"unschedulable": true}}`, noRight + `patch resource \"nodes\"`},
	{http.MethodDelete, "/api/v1/nodes/node-b", "", ``, noRight + `delete resource \"nodes\"`},
	{http.MethodGet, "/api/v1/nodes/node-b/proxy/pods", "", ``, noRight + `get resource \"nodes/proxy\"`},

	event(agentAccount, "node-a", `{"kind": "Node", "apiVersion": "v1", "name": "node-b", "uid": "node-b"}`, "", "and not of Node node-b"),
	event(agentAccount, "node-a", `{"kind": "Pod", "apiVersion": "v1", "name": "web", "namespace": "default"}`, "", "and not of Pod web"),
	because("FailedScheduling", event(agentAccount, "node-a", `{"kind": "Pod", "apiVersion": "v1", "name": "web", "namespace": "default"}`, "", "and not of Pod web")),
	because("PolicyDropped", event(agentAccount, "node-a", `{"kind": "Pod", "apiVersion": "example.com/v1", "name": "web", "namespace": "default"}`, "", "and not of Pod web")),
	because("PolicyDropped", event(agentAccount, "node-a", `{"kind": "Service", "apiVersion": "v1", "name": "web", "namespace": "default"}`, "", "and not of Service web")),
	because("PolicyDropped", event(agentAccount, "node-b", `{"kind": "Pod", "apiVersion": "v1", "name": "web", "namespace": "default"}`, "", "says that it is one")),
	event(agentAccount, "node-a", `{"kind": "BGPPeer", "apiVersion": "example.com/v1", "name": "router"}`, "", "and not of BGPPeer router"),
	event(agentAccount, "node-b", `{"kind": "Node", "apiVersion": "v1", "name": "node-a"}`, "", "says that it is one"),
	event("kubelet", "node-a", `{"kind": "Node", "apiVersion": "v1", "name": "node-a"}`, "", "says that it is one"),
	event(agentAccount, "node-a", `{"kind": "Node", "apiVersion": "v1", "name": "node-a"}`, `, "finalizers": ["example.com/hold"]`, "an event of an agent has no owners and no finalizers"),
	event(agentAccount, "node-a", `{"kind": "Service", "apiVersion": "v1", "name": "web", "namespace": "default"}`, "", "and not of Service web"),
	takeEvent("by-cloud", agentAccount, "node-a", "the agent of node node-a counts in its own events"),
	takeEvent("by-node-b", agentAccount, "node-a", "the agent of node node-a counts in its own events"),
	{http.MethodDelete, "/api/v1/namespaces/default/events", "", ``, noRight + `deletecollection resource \"events\"`},

	ipBlock("10.50.1.0-26", "10.50.1.0/26", "node-b", ownedByA, "", "an agent takes and gives back blocks of its own node only"),
	{http.MethodDelete, own + "/ipblocks/10.50.0.0-26", "", ``, "an agent takes and gives back blocks of its own node only"},
	{http.MethodPatch, own + "/ipblocks/10.50.0.0-26", "", `{"metadata": {"ownerReferences": null}}`, "an agent takes and gives back blocks of its own node only"},
	ipBlock("10.50.1.0-26", "10.50.1.0/26", "node-a", "", "", "a block is owned by the Node that has it, and by nothing else"),
	ipBlock("10.50.1.0-26", "10.50.1.0/26", "node-a", strings.Replace(ownedByA, "node-a", "node-b", 1), "", "a block is owned by the Node that has it, and by nothing else"),
	ipBlock("10.50.1.0-26", "10.50.1.0/26", "node-a", ownedByA+`, "finalizers": ["example.com/hold"]`, "", "a block has no finalizers"),
	ipBlock("64.0.0.0-3", "64.0.0.0/3", "node-a", ownedByA, "", "no pool has blocks as large as that"),
	ipBlock("2000-0-0-0-0-0-0-0-3", "2000::/3", "node-a", ownedByA, "", "no pool has blocks as large as that"),
	ipBlock("169.254.169.254-32", "169.254.169.254/32", "node-a", ownedByA, "", "holds addresses that no pod can have"),
	ipBlock("10.50.1.0-26", "10.50.1.0/26", "node-a", ownedByA, `, "fixed": true`, "a fixed block is a single address"),
	ipBlock("another-name", "10.50.0.0/26", "node-a", ownedByA, "", "the name of a block follows from its prefix"),
	ipBlock("fd00-050-0-0-0-0-0-40-122", "fd00:50::40/122", "node-a", ownedByA, "", "the name of a block follows from its prefix"),
	ipBlock("fd00-51-0-0-0-0-0-40-122", "fd00:50::40/122", "node-a", ownedByA, "", "the name of a block follows from its prefix"),

	{http.MethodPatch, own + "/ippools/public/status", "", `{"status": {"conditions": [{"type": "Ready", "status": "False", "reason": "x", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}}`, "an agent sets no condition of a pool but Valid"},
	{http.MethodPatch, own + "/ippools/public", "", `{"spec": {"disabled": true}}`, noRight + `patch resource \"ippools\"`},
	{http.MethodPatch, own + "/bgppeers/router/status", "", `{"status": {"sessions": []}}`, "the agent of node node-a tells of its own session only"},
	{http.MethodPatch, own + "/bgppeers/router/status?fieldManager=fathom-agent%2Fnode-b&force=true", apply,
		`{"apiVersion": "fathom.network/v1alpha1", "kind": "BGPPeer", "metadata": {"name": "router"}, "status": {"sessions": [{"node": "node-b", "state": "Established", "since": "2026-01-01T00:00:00Z"}]}}`, "tells of its own session only"},
	{http.MethodPatch, own + "/bgppeers/router/status?fieldManager=x&force=true", apply,
		`{"apiVersion": "fathom.network/v1alpha1", "kind": "BGPPeer", "metadata": {"name": "router"}, "status": {"sessions": [{"node": "node-c", "state": "Active", "since": "2026-01-01T00:00:00Z"}]}}`, "tells of its own session only"},
	{http.MethodDelete, own + "/bgppeers/router", "", ``, noRight + `delete resource \"bgppeers\"`},

	{http.MethodGet, system + "/secrets", "", ``, noRight + `list resource \"secrets\"`},
	{http.MethodGet, system + "/secrets?watch=true", "", ``, noRight + `watch resource \"secrets\"`},
	{http.MethodGet, system + "/secrets/fathom-controller-token", "", ``, noRight + `get resource \"secrets\"`},
	{http.MethodGet, "/api/v1/namespaces/kube-system/secrets/fathom-bgp", "", ``, noRight + `get resource \"secrets\"`},
	{http.MethodPost, system + "/secrets", "", `{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "fathom-membership"}}`, noRight + `create resource \"secrets\"`},
	{http.MethodPost, system + "/serviceaccounts/fathom-controller/token", "", `{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}`, noRight + `create resource \"serviceaccounts/token\"`},
	{http.MethodGet, system + "/configmaps/another", "", ``, noRight + `get resource \"configmaps\"`},
	{http.MethodPatch, system + "/configmaps/fathom-config", "", `{"data": {"mode": "vxlan"}}`, noRight + `patch resource \"configmaps\"`},
	{http.MethodPatch, "/api/v1/namespaces/default/services/web/status", "", `{"status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.9"}]}}}`, noRight + `patch resource \"services/status\"`},
	{http.MethodPost, "/apis/networking.k8s.io/v1/namespaces/default/networkpolicies", "", `{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "mine"}, "spec": {"podSelector": {}}}`, noRight + `create resource \"networkpolicies\"`},
	{http.MethodPatch, "/apis/networking.k8s.io/v1/namespaces/default/networkpolicies/deny", "", `{"spec": {"ingress": [{}]}}`, noRight + `patch resource \"networkpolicies\"`},
	{http.MethodDelete, "/apis/networking.k8s.io/v1/namespaces/default/networkpolicies/deny", "", ``, noRight + `delete resource \"networkpolicies\"`},
	{http.MethodPost, "/apis/policy.networking.k8s.io/v1beta1/clusternetworkpolicies", "", `{"apiVersion": "policy.networking.k8s.io/v1beta1", "kind": "ClusterNetworkPolicy", "metadata": {"name": "mine"}, "spec": {"tier": "Admin", "priority": 1, "subject": {"namespaces": {}}}}`, noRight + `create resource \"clusternetworkpolicies\"`},
	{http.MethodPatch, "/apis/policy.networking.k8s.io/v1beta1/clusternetworkpolicies/deny", "", `{"spec": {"priority": 2}}`, noRight + `patch resource \"clusternetworkpolicies\"`},
	{http.MethodDelete, "/apis/policy.networking.k8s.io/v1beta1/clusternetworkpolicies/deny", "", ``, noRight + `delete resource \"clusternetworkpolicies\"`},
}

// controllerMisuses are tried by the controller.
var controllerMisuses = []misuse{
	{http.MethodPost, system + "/secrets", "", `{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "mine"}}`, "the controller makes one Secret, fathom-system/fathom-membership"},
	{http.MethodPost, system + "/secrets", "", `{"apiVersion": "v1", "kind": "Secret", "metadata": {"generateName": "fathom-membership"}}`, "the controller makes one Secret, fathom-system/fathom-membership"},
	{http.MethodPost, system + "/secrets", "", `{"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/basic-auth", "metadata": {"name": "fathom-membership"}, "data": {"username": "eA=="}}`, "the Secret fathom-membership is of type Opaque"},
	{http.MethodPost, system + "/secrets", "", `{"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/service-account-token",
		"metadata": {"name": "fathom-membership", "annotations": {"kubernetes.io/service-account.name": "fathom-controller"}}}`, "the Secret fathom-membership is of type Opaque"},
	{http.MethodPost, system + "/secrets", "", `{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "fathom-membership", "annotations": {"kubernetes.io/service-account.name": "fathom-controller"}}}`,
		"the Secret fathom-membership has no annotations, owners and finalizers"},
	{http.MethodPost, "/api/v1/namespaces/kube-system/secrets", "", `{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "fathom-membership"}}`, noRight + `create resource \"secrets\"`},
	{http.MethodGet, system + "/secrets/fathom-bgp", "", ``, noRight + `get resource \"secrets\"`},
	{http.MethodGet, "/apis/discovery.k8s.io/v1/endpointslices", "", ``, noRight + `list resource \"endpointslices\"`},
	{http.MethodGet, "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices", "", ``, noRight + `list resource \"endpointslices\"`},
	{http.MethodGet, system + "/configmaps", "", ``, noRight + `list resource \"configmaps\"`},
	{http.MethodPatch, system + "/configmaps/fathom-config", "", `{"data": {"externalIPs": "any"}}`, noRight + `patch resource \"configmaps\"`},
	{http.MethodPost, system + "/serviceaccounts/fathom-controller/token", "", `{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}`, noRight + `create resource \"serviceaccounts/token\"`},

	{http.MethodPatch, "/api/v1/namespaces/default/services/web/status", "", `{"metadata": {"labels": {"app": "mine"}}}`, "and not metadata.labels"},
	{http.MethodPatch, "/api/v1/namespaces/default/services/web/status", "", `{"metadata": {"annotations": {"example.com/x": "y"}}}`, "and not metadata.annotations"},
	{http.MethodPatch, "/api/v1/namespaces/default/services/web/status", "", `{"metadata": {"finalizers": ["example.com/mine"]}}`, "and not metadata.finalizers"},
	{http.MethodPatch, "/api/v1/namespaces/default/services/web/status", "", `{"metadata": {"ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "x", "uid": "1-2"}]}}`, "and not metadata.ownerReferences"},
	{http.MethodPatch, "/api/v1/namespaces/default/services/web/status", "", `{"status": {"conditions": [{"type": "X", "status": "True", "reason": "x", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}}`, "and not status.conditions"},
	{http.MethodPatch, "/api/v1/namespaces/default/services/web/status", "", `{"status": {"loadBalancer": {"ingress": [{"hostname": "example.com"}]}}}`, "the controller gives Services addresses, and no names"},
	{http.MethodPatch, "/api/v1/namespaces/default/services/cloud/status", "", `{"status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.9"}]}}}`, "the controller gives addresses to Services of type LoadBalancer alone"},
	{http.MethodPatch, "/api/v1/namespaces/default/services/web", "", `{"spec": {"externalIPs": ["10.1.1.1"]}}`, noRight + `patch resource \"services\"`},

	{http.MethodPatch, own + "/addresspools/outside/status", "", `{"status": {"conditions": [{"type": "Ready", "status": "False", "reason": "x", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}}`, "the controller sets no condition of a pool but Valid"},
	{http.MethodPatch, own + "/addresspools/outside", "", `{"spec": {"addresses": ["10.1.1.0/24"]}}`, noRight + `patch resource \"addresspools\"`},
	{http.MethodPatch, own + "/ippools/public", "", `{"spec": {"disabled": true}}`, "the controller changes the finalizer fathom.network/blocks of an IPPool, and not spec"},
	{http.MethodPatch, own + "/ippools/public", "", `{"metadata": {"finalizers": ["example.com/mine"]}}`, "of an IPPool, and not metadata.finalizers"},
	{http.MethodPatch, own + "/ippools/public", "", `{"metadata": {"labels": {"app": "mine"}}}`, "of an IPPool, and not metadata.labels"},
	{http.MethodPatch, own + "/ippools/public/status", "", `{"status": {"nodes": 9}}`, noRight + `patch resource \"ippools/status\"`},
	{http.MethodPatch, own + "/bgppeers/router/status", "", `{"status": {"sessions": [{"node": "node-b", "state": "Established", "since": "2026-01-01T00:00:00Z"}]}}`, "the controller takes away sessions of nodes that are gone"},
	{http.MethodPatch, "/api/v1/nodes/node-b/status", merge, `{"metadata": {"annotations": {"fathom.network/mode": "vxlan"}}}`, noRight + `patch resource \"nodes/status\"`},

	{http.MethodPatch, "/apis/policy.networking.k8s.io/v1beta1/clusternetworkpolicies/tenants/status", "", `{"status": {"conditions": [{"type": "Ready", "status": "False", "reason": "x", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}}`, "the controller sets no condition of a policy but fathom.network/Valid"},
	{http.MethodPatch, "/apis/policy.networking.k8s.io/v1beta1/clusternetworkpolicies/tenants", "", `{"spec": {"priority": 2}}`, noRight + `patch resource \"clusternetworkpolicies\"`},
	{http.MethodPatch, "/apis/networking.k8s.io/v1/namespaces/default/networkpolicies/deny", "", `{"spec": {"ingress": [{}]}}`, noRight + `patch resource \"networkpolicies\"`},
	event(controllerAccount, "x", `{"kind": "ClusterNetworkPolicy", "apiVersion": "example.com/v1", "name": "tenants"}`, "", "and not of ClusterNetworkPolicy tenants"),
	event(controllerAccount, "x", `{"kind": "NetworkPolicy", "apiVersion": "example.com/v1", "name": "deny", "namespace": "default"}`, "", "and not of NetworkPolicy deny"),
	event(controllerAccount, "x", `{"kind": "Node", "apiVersion": "v1", "name": "node-b"}`, "", "and not of Node node-b"),
	event(controllerAccount, "x", `{"kind": "AddressPool", "apiVersion": "example.com/v1", "name": "outside"}`, "", "and not of AddressPool outside"),
	event(agentAccount, "node-a", `{"kind": "Service", "apiVersion": "v1", "name": "web", "namespace": "default"}`, "", "an event of the controller says that it is one"),
	event(controllerAccount, "x", `{"kind": "Service", "apiVersion": "v1", "name": "web", "namespace": "default"}`, ownedByA, "an event of the controller has no owners and no finalizers"),
	takeEvent("by-cloud", controllerAccount, "x", "the controller counts in its own events, and changes nobody else's"),

	{http.MethodPost, "/apis/coordination.k8s.io/v1/namespaces/fathom-system/leases", "", `{"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "another"}, "spec": {}}`, "the controller has one Lease"},
	{http.MethodPost, "/apis/coordination.k8s.io/v1/namespaces/fathom-system/leases", "", `{"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "fathom-controller"` + ownedByA + `}, "spec": {}}`, "the controller's Lease has no owners and no finalizers"},
	{http.MethodPut, "/apis/coordination.k8s.io/v1/namespaces/fathom-system/leases/another", "", `{"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "another"}, "spec": {}}`, noRight + `update resource \"leases\"`},
	{http.MethodPost, "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases", "", `{"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "kube-scheduler"}, "spec": {}}`, noRight + `create resource \"leases\"`},
}

// unboundAgent is tried by who has asked for a token of the agents' account, as `kubectl create token` does.
var unboundAgent = []misuse{
	onNode(`{"metadata": {"annotations": {"fathom.network/mode": "vxlan"}}}`, noNode),
	ipBlock("10.50.1.0-26", "10.50.1.0/26", "node-a", ownedByA, "", noNode),
	ipBlock("10.50.1.0-26", "10.50.1.0/26", "", strings.Replace(ownedByA, "node-a", "", 1), "", "node"), // a node without a name
	event(agentAccount, "", `{"kind": "Node", "apiVersion": "v1", "name": ""}`, "", noNode),
	{http.MethodDelete, own + "/ipblocks/10.50.0.0-26", "", ``, noNode},
}

// unboundController is the same with the controller's account.
var unboundController = []misuse{
	{http.MethodPatch, "/api/v1/namespaces/default/services/web/status", "", `{"status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.9"}]}}}`, noNode},
	{http.MethodPost, system + "/secrets", "", `{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "fathom-membership"}}`, noNode},
}

// testPolicies looks whether each policy is bound, and whether each message that is written down was heard.
func testPolicies(t *testing.T, objects []*unstructured.Unstructured, heard []string) {
	t.Helper()
	bound := map[string]bool{}
	for _, o := range objects {
		if o.GetKind() == "ValidatingAdmissionPolicyBinding" {
			name, _, _ := unstructured.NestedString(o.Object, "spec", "policyName")
			bound[name] = true
		}
	}
	all := strings.Join(heard, "\n")
	for _, o := range objects {
		if o.GetKind() != "ValidatingAdmissionPolicy" {
			continue
		}
		var policy admissionregistrationv1.ValidatingAdmissionPolicy
		testenv.Must(t, runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &policy))
		if !bound[policy.Name] {
			t.Errorf("policy %s is bound to nothing", policy.Name)
		}
		if !strings.Contains(all, "ValidatingAdmissionPolicy '"+policy.Name+"'") {
			t.Errorf("policy %s refuses nothing", policy.Name)
		}
		for _, v := range policy.Spec.Validations {
			if v.Message != "" && !strings.Contains(all, v.Message) {
				t.Errorf("policy %s: nothing is refused with %q", policy.Name, v.Message)
			}
		}
	}
}
