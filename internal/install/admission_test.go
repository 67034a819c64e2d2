package install_test

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	cnp "github.com/fathom-network/fathom/api/clusternetworkpolicy/v1beta1"
	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/ippool"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/policyfacts"
	"github.com/fathom-network/fathom/internal/facts/vip"
	"github.com/fathom-network/fathom/internal/install"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

const (
	agentAccount      = "fathom-agent"
	controllerAccount = "fathom-controller"
	// noNode is what a token is told that is not of a pod on a node.
	noNode = "this token names no node"
)

// TestAdmission tries what the tokens of an agent and of the controller are good for, against a real API server: whatever
// deploy/ gives them is used by the code that runs with them, or by a line here, and misuses are refused in the words
// that are expected. A right that is added without a case fails, and so does one that is not needed any more.
func TestAdmission(t *testing.T) {
	path := testenv.APIServer(t)
	admin, err := kube.Connect(path)
	testenv.Must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	objects, err := install.Objects(install.Options{Config: map[string]string{"serviceProxy": "auto", "dns": "node-cache"}})
	testenv.Must(t, err)
	objects = slices.DeleteFunc(objects, func(o *unstructured.Unstructured) bool {
		return o.GetKind() == "DaemonSet" || o.GetKind() == "Deployment" // nobody would run them here
	})
	testenv.Must(t, admin.Apply(ctx, install.Owner, objects))
	prepare(ctx, t, admin)

	w := newWitness(t, path)
	agent := w.as(t, agentAccount, podToken(ctx, t, admin, agentAccount, "node-a"))
	controller := w.as(t, controllerAccount, podToken(ctx, t, admin, controllerAccount, "node-a"))
	anyAgent := w.as(t, agentAccount, token(ctx, t, admin, agentAccount, nil))
	anyController := w.as(t, controllerAccount, token(ctx, t, admin, controllerAccount, nil))

	// First what is to be refused, none of which is carried out even if it is not (dry run). When all of it is, the policies
	// are in force, which takes the API server a moment.
	tries := slices.Concat(
		misusesBy("agent", agent, agentMisuses), misusesBy("controller", controller, controllerMisuses),
		misusesBy("agent without a node", anyAgent, unboundAgent), misusesBy("controller without a node", anyController, unboundController),
	)
	refusals := map[string]string{}
	testenv.Eventually(t, "every misuse is refused", func() (bool, string) {
		var wrong []string
		for _, m := range tries {
			name := m.name()
			if refusals[name] != "" {
				continue
			}
			code, text := m.by.do(ctx, t, m.method, m.path, m.kind, m.body, true)
			if (code == http.StatusForbidden || code == http.StatusUnprocessableEntity) && strings.Contains(text, m.want) {
				refusals[name] = text
			} else {
				wrong = append(wrong, fmt.Sprintf("%s: %d %s\n\twant %q", name, code, text, m.want))
			}
		}
		return len(wrong) == 0, strings.Join(wrong, "\n")
	})
	if len(refusals) < 30 {
		t.Errorf("%d misuses are tried, want 30 at least", len(refusals))
	}
	testPolicies(t, objects, slices.Collect(maps.Values(refusals)))

	// Then what is needed, by the code that needs it. Each change is tried with the account's other token before, which
	// no pod has.
	agent.refusedTo, controller.refusedTo = anyAgent, anyController
	useController(ctx, t, controller, admin) // makes a Secret that agents read
	useAgent(ctx, t, agent, admin)
	for _, problem := range w.problems() {
		t.Error(problem)
	}

	rights := rightsOf(t, objects)
	if len(rights) < 40 {
		t.Errorf("%d rights are read from the manifests: %v", len(rights), rights)
	}
	used := w.used()
	for _, r := range rights {
		if !slices.ContainsFunc(used, r.covers) {
			t.Errorf("deploy/ gives %s, and nothing here uses it: have the test use it as the code does, with misuses of it in the table, or take it away", r)
		}
	}
}

// prepare makes what agents and the controller find.
func prepare(ctx context.Context, t *testing.T, admin *kube.Client) {
	t.Helper()
	for _, name := range []string{"node-a", "node-b"} {
		n, err := admin.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name,
			Labels: map[string]string{"rack": "a"}, Annotations: map[string]string{"example.com/owner": "somebody"}, Finalizers: []string{"example.com/hold"}}}, metav1.CreateOptions{})
		testenv.Must(t, err)
		n.Status = corev1.NodeStatus{
			Addresses:       []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "10.1.1.2"}},
			Capacity:        corev1.ResourceList{corev1.ResourceCPU: quantity("2"), corev1.ResourceMemory: quantity("4096Mi")},
			Allocatable:     corev1.ResourceList{corev1.ResourceCPU: quantity("1900m")},
			DaemonEndpoints: corev1.NodeDaemonEndpoints{KubeletEndpoint: corev1.DaemonEndpoint{Port: 10250}},
			Images:          []corev1.ContainerImage{{Names: []string{"registry.example/a:1"}, SizeBytes: 1}},
			VolumesInUse:    []corev1.UniqueVolumeName{"example.com/volume"},
			Conditions: []corev1.NodeCondition{
				{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "KubeletReady"},
				{Type: corev1.NodeNetworkUnavailable, Status: corev1.ConditionTrue, Reason: "NoRouteCreated"},
				{Type: corev1.NodeDiskPressure, Status: corev1.ConditionFalse},
			},
		}
		_, err = admin.CoreV1().Nodes().UpdateStatus(ctx, n, metav1.UpdateOptions{})
		testenv.Must(t, err)
	}
	made, err := kube.Decode(strings.NewReader(`
apiVersion: fathom.network/v1alpha1
kind: IPPool
metadata: {name: public}
spec: {ipv4: {cidr: 10.50.0.0/16}, ipv6: {cidr: "fd00:50::/64"}}
---
apiVersion: fathom.network/v1alpha1
kind: AddressPool
metadata: {name: outside}
spec: {addresses: [192.0.2.0/28]}
---
apiVersion: policy.networking.k8s.io/v1beta1
kind: ClusterNetworkPolicy
metadata: {name: tenants}
spec: {tier: Admin, priority: 1, subject: {namespaces: {}}}
---
apiVersion: fathom.network/v1alpha1
kind: BGPPeer
metadata: {name: router}
spec: {peerAddress: 192.0.2.1, peerASN: 64500, localASN: 64512, passwordSecret: {}}
---
apiVersion: v1
kind: Event
metadata: {name: by-cloud, namespace: default}
involvedObject: {kind: Service, apiVersion: v1, name: web, namespace: default}
reason: SyncLoadBalancerFailed
source: {component: service-controller}
---
apiVersion: v1
kind: Event
metadata: {name: by-node-b, namespace: default}
involvedObject: {kind: Service, apiVersion: v1, name: web, namespace: default}
reason: ServiceProblem
source: {component: fathom-agent, host: node-b}
reportingComponent: fathom-agent
reportingInstance: node-b
---
apiVersion: v1
kind: Secret
metadata: {name: fathom-bgp, namespace: fathom-system}
stringData: {password: tell-nobody}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default, labels: {app: web}, finalizers: [example.com/hold]}
spec: {type: LoadBalancer, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: inner, namespace: default}
spec: {ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: cloud, namespace: default}
spec: {type: LoadBalancer, loadBalancerClass: example.com/cloud, ports: [{port: 80}]}
`))
	testenv.Must(t, err)
	testenv.Must(t, admin.Apply(ctx, "test", made))
	for _, node := range []string{"node-b", "node-z"} { // of which the cluster has the first
		testenv.Must(t, admin.PublishBGPSession(ctx, "router", node, session(node, "Active")))
	}
	_, err = admin.CreateBlock(ctx, block("10.50.0.0-26", "10.50.0.0/26", "node-b"))
	testenv.Must(t, err)
}

func session(node, state string) *v1alpha1.BGPSession {
	return &v1alpha1.BGPSession{Node: node, State: state, Since: metav1.NewTime(time.Unix(1000, 0))}
}

func block(name, cidr, node string) *v1alpha1.IPBlock {
	return &v1alpha1.IPBlock{ObjectMeta: metav1.ObjectMeta{Name: name, OwnerReferences: []metav1.OwnerReference{kube.NodeOwner(node, "1-2")}},
		Spec: v1alpha1.IPBlockSpec{Pool: "public", CIDR: cidr, Node: node}}
}

// podToken is what kubelet gives a pod of the account on the node.
func podToken(ctx context.Context, t *testing.T, admin *kube.Client, account, node string) string {
	t.Helper()
	pod, err := admin.CoreV1().Pods(netconf.Namespace).Create(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{GenerateName: account + "-"},
		Spec: corev1.PodSpec{ServiceAccountName: account, NodeName: node, Containers: []corev1.Container{{Name: "c", Image: "i"}}}}, metav1.CreateOptions{})
	testenv.Must(t, err)
	return token(ctx, t, admin, account, &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID})
}

// token is one of an account, bound to an object or, as of `kubectl create token`, to none.
func token(ctx context.Context, t *testing.T, admin *kube.Client, account string, to *authenticationv1.BoundObjectReference) string {
	t.Helper()
	r, err := admin.CoreV1().ServiceAccounts(netconf.Namespace).CreateToken(ctx, account,
		&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{BoundObjectRef: to}}, metav1.CreateOptions{})
	testenv.Must(t, err)
	return r.Status.Token
}

// useAgent does what the agent of node-a does.
func useAgent(ctx context.Context, t *testing.T, as *caller, admin *kube.Client) {
	t.Helper()
	c := as.client(t)
	view := c.View(ctx, "node-a", func() {})
	services := kube.Watch(ctx, c, kube.Services, kube.Options[*corev1.Service]{})
	endpoints := kube.Watch(ctx, c, kube.EndpointSlices, kube.Options[*discoveryv1.EndpointSlice]{})
	policies := kube.Watch(ctx, c, kube.NetworkPolicies, kube.Options[*networkingv1.NetworkPolicy]{})
	cluster := kube.Watch(ctx, c, kube.ClusterNetworkPolicies, kube.Options[*cnp.ClusterNetworkPolicy]{})
	pods := kube.Watch(ctx, c, kube.Pods, kube.Options[*corev1.Pod]{}) // once there are policies
	testenv.Eventually(t, "an agent sees everything", func() (bool, string) {
		return view.Synced() && services.Synced() && endpoints.Synced() && policies.Synced() && cluster.Synced() && pods.Synced() && view.BGPPeers.Listed(), fmt.Sprint(view.Problem())
	})
	as.list(ctx, t, "/api/v1/nodes", "/api/v1/pods?fieldSelector=spec.nodeName%3Dnode-a", "/api/v1/pods", "/apis/networking.k8s.io/v1/networkpolicies", "/apis/policy.networking.k8s.io/v1beta1/clusternetworkpolicies", "/api/v1/namespaces", "/api/v1/services",
		"/apis/discovery.k8s.io/v1/endpointslices", "/apis/networking.k8s.io/v1/servicecidrs", own+"/ippools", own+"/addresspools", own+"/bgppeers",
		"/api/v1/namespaces/fathom-system/configmaps?fieldSelector=metadata.name%3Dfathom-config")
	if _, err := kube.List(ctx, c, kube.IPBlocks, kube.Selection{}); err != nil {
		t.Error(err)
	}
	for _, ready := range []bool{false, true} {
		testenv.Must(t, c.PublishNetwork(ctx, "node-a", kube.NodeNetwork{Annotations: map[string]string{"fathom.network/mode": "auto", "fathom.network/tunnel": "none"},
			Unavailable: !ready, Reason: "Test", Message: "test"}))
	}
	testenv.Must(t, c.PublishBGPSession(ctx, "router", "node-a", session("node-a", "Established")))
	testenv.Must(t, c.PublishBGPSession(ctx, "router", "node-a", session("node-a", "Active")))
	testenv.Must(t, c.PublishBGPSession(ctx, "router", "node-a", nil))
	testenv.Must(t, kube.SetStatus(ctx, c, kube.IPPools, "public", v1alpha1.IPPoolStatus{Nodes: 1, IPv4: &v1alpha1.IPPoolUsage{Blocks: 1, Addresses: 65536, Taken: 64},
		Conditions: []metav1.Condition{{Type: v1alpha1.PoolValid, Status: metav1.ConditionTrue, Reason: "Valid", LastTransitionTime: metav1.Now()}}}))
	for name, cidr := range map[string]string{"10.50.0.64-26": "10.50.0.64/26", "10.50.0.7-32": "10.50.0.7/32", "fd00-50-0-0-0-0-0-40-122": "fd00:50::40/122"} {
		want := block(name, cidr, "node-a")
		want.Spec.Fixed = strings.HasSuffix(name, "-32")
		made, err := c.CreateBlock(ctx, want)
		testenv.Must(t, err)
		testenv.Must(t, c.SetBlockOwner(ctx, name, made.UID, kube.NodeOwner("node-a", "3-4")))
		testenv.Must(t, c.DeleteBlock(ctx, name, made.UID))
	}
	pools, err := kube.List(ctx, admin, kube.IPPools, kube.Selection{})
	testenv.Must(t, err)
	peers := view.BGPPeers.All()
	by := kube.Reporter{Component: agentAccount, Instance: "node-a"}
	recordTwice(ctx, t, c, admin, by, []corev1.ObjectReference{kube.NodeReference("node-a"), kube.Reference(pools[0]), kube.Reference(peers[0]),
		{Kind: "Pod", APIVersion: "v1", Namespace: "default", Name: "web", UID: "web"}})
	for _, name := range []string{"fathom-bgp", "fathom-membership"} {
		if _, err := c.Secret(ctx, netconf.Namespace, name); err != nil {
			t.Error(err)
		}
	}
}

// recordTwice has events recorded that repeat: the second time, the one that is there is changed.
func recordTwice(ctx context.Context, t *testing.T, c, admin *kube.Client, by kube.Reporter, objects []corev1.ObjectReference) {
	t.Helper()
	r := c.NewRecorder(ctx, by)
	reason := func(about corev1.ObjectReference) string {
		if about.Kind == "Pod" {
			return "PolicyDropped"
		}
		return "Test"
	}
	for range 2 {
		for _, about := range objects {
			r.Record(kube.Event{Object: about, Warning: true, Reason: reason(about), Message: "test"})
		}
	}
	for _, about := range objects {
		testenv.Eventually(t, "the event of "+about.Kind+" "+about.Name+" is counted", func() (bool, string) {
			l, err := admin.CoreV1().Events("").List(ctx, metav1.ListOptions{FieldSelector: "reason=" + reason(about) + ",source=" + by.Component + ",involvedObject.kind=" + about.Kind})
			testenv.Must(t, err)
			return slices.ContainsFunc(l.Items, func(e corev1.Event) bool { return e.InvolvedObject.Name == about.Name && e.Count == 2 }), fmt.Sprint(l.Items)
		})
	}
}

// useController does what the controller does.
func useController(ctx context.Context, t *testing.T, as *caller, admin *kube.Client) {
	t.Helper()
	c := as.client(t)
	view := c.BalancerView(ctx, vip.Owner, func() {})
	namespaced := kube.Watch(ctx, c, kube.NetworkPolicies, kube.Options[*networkingv1.NetworkPolicy]{})
	cluster := kube.Watch(ctx, c, kube.ClusterNetworkPolicies, kube.Options[*cnp.ClusterNetworkPolicy]{})
	testenv.Eventually(t, "the controller sees everything", func() (bool, string) {
		return view.Synced() && view.BGPPeers.Len() == 1 && namespaced.Synced() && cluster.Len() == 1, ""
	})
	as.list(ctx, t, "/api/v1/services", "/api/v1/namespaces", "/api/v1/nodes", "/apis/networking.k8s.io/v1/servicecidrs", own+"/addresspools", own+"/ippools", own+"/ipblocks", own+"/bgppeers",
		"/apis/networking.k8s.io/v1/networkpolicies", "/apis/policy.networking.k8s.io/v1beta1/clusternetworkpolicies", "/api/v1/namespaces/fathom-system/configmaps?fieldSelector=metadata.name%3Dfathom-config",
		"/apis/discovery.k8s.io/v1/namespaces/default/endpointslices?fieldSelector=metadata.name%3Dkubernetes")
	for _, finalizers := range [][]string{{ippool.Finalizer}, nil} {
		pools, err := kube.List(ctx, admin, kube.IPPools, kube.Selection{})
		testenv.Must(t, err)
		testenv.Must(t, c.SetPoolFinalizers(ctx, pools[0], finalizers))
	}
	mode := corev1.LoadBalancerIPModeVIP
	for _, ingress := range [][]corev1.LoadBalancerIngress{{{IP: "192.0.2.1", IPMode: &mode}}, nil} {
		s, err := admin.CoreV1().Services("default").Get(ctx, "web", metav1.GetOptions{})
		testenv.Must(t, err)
		testenv.Must(t, c.SetIngress(ctx, s, vip.Owner, ingress, vip.Finalizers(s, len(ingress) > 0)))
	}
	testenv.Must(t, kube.SetStatus(ctx, c, kube.AddressPools, "outside", v1alpha1.AddressPoolStatus{Services: 1,
		Conditions: []metav1.Condition{{Type: v1alpha1.PoolValid, Status: metav1.ConditionTrue, Reason: "Valid", LastTransitionTime: metav1.Now()}}}))
	testenv.Must(t, c.PublishBGPSession(ctx, "router", "node-z", nil))
	policies, err := kube.List(ctx, admin, kube.ClusterNetworkPolicies, kube.Selection{})
	testenv.Must(t, err)
	condition, differs := policyfacts.Condition(policies[0], policyfacts.ClusterNetworkPolicy(policies[0]), time.Now())
	if !differs {
		t.Error("a new policy has a condition already")
	}
	testenv.Must(t, c.SetPolicyCondition(ctx, vip.Owner, policies[0].Name, condition))
	recordTwice(ctx, t, c, admin, kube.Reporter{Component: vip.Owner, Instance: "pod"}, []corev1.ObjectReference{kube.Reference(view.AddressPools.All()[0]),
		kube.Reference(&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"}}),
		kube.Reference(policies[0]), kube.Reference(&networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "deny", UID: "uid"}}),
		kube.Reference(&v1alpha1.IPBlock{ObjectMeta: metav1.ObjectMeta{Name: "10.50.0.0-26", UID: "uid"}})})
	for range 2 { // the second time there is one
		testenv.Must(t, c.EnsureSecret(ctx, netconf.Namespace, "fathom-membership", map[string][]byte{"key": bytes.Repeat([]byte{1}, 32)}))
	}
	renewed := request{controllerAccount, "update", "coordination.k8s.io", "leases", netconf.Namespace, vip.Owner}
	testenv.Must(t, c.Lead(ctx, netconf.Namespace, vip.Owner, "pod", func(context.Context) error {
		testenv.Eventually(t, "the controller renews its Lease", func() (bool, string) { return slices.Contains(as.w.used(), renewed), "" })
		return nil
	}))
}
