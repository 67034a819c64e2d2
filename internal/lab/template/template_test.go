package template

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fathom-network/fathom/internal/lab/stored"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

var (
	began   = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	oldID   = stored.Identity{Underlay4: netip.MustParsePrefix("10.201.0.0/16"), Underlay6: netip.MustParsePrefix("fd00:201::/48")}
	newID   = stored.Identity{Underlay4: netip.MustParsePrefix("10.99.0.0/16"), Underlay6: netip.MustParsePrefix("fd00:99::/48")}
	uidA    = types.UID("11111111-1111-4111-8111-111111111111")
	uidB    = types.UID("22222222-2222-4222-8222-222222222222")
	nodeUID = types.UID("33333333-3333-4333-8333-333333333333")
)

func object(name string, uid types.UID, age time.Duration) metav1.ObjectMeta {
	return metav1.ObjectMeta{Name: name, Namespace: "kube-system", UID: uid, CreationTimestamp: metav1.NewTime(began.Add(-age)),
		ManagedFields: []metav1.ManagedFieldsEntry{
			{Manager: "first", Operation: metav1.ManagedFieldsOperationUpdate, FieldsV1: metav1.NewFieldsV1(fmt.Sprintf(`{"f:x":{"k:{\"uid\":\"%s\"}":{}}}`, uidA))},
			{Manager: "kubelet", Operation: metav1.ManagedFieldsOperationUpdate, Subresource: "status", FieldsV1: metav1.NewFieldsV1(`{}`)},
		}}
}

// stateOf is what an API server would have stored.
func stateOf(t *testing.T, objects map[string]runtime.Object) stored.State {
	t.Helper()
	var s stored.State
	for path, o := range objects {
		if err := s.Add(path, o); err != nil {
			t.Fatal(err)
		}
	}
	slices.SortFunc(s.KVs, func(a, b stored.KV) int { return bytes.Compare(a.Key, b.Key) })
	return s
}

func get[T runtime.Object](t *testing.T, s stored.State, path string) T {
	t.Helper()
	for _, kv := range s.KVs {
		if string(kv.Key) == stored.Registry+path {
			o, err := kube.DecodeStored(kv.Value)
			if err != nil {
				t.Fatal(err)
			}
			return o.(T)
		}
	}
	t.Fatalf("there is no %s", path)
	panic("unreachable")
}

func has(s stored.State, path string) bool {
	return slices.ContainsFunc(s.KVs, func(kv stored.KV) bool { return string(kv.Key) == stored.Registry+path })
}

// A cluster of a template has the objects of the one that the template was made of, with what is its own in the place of what was the other's.
func TestObjects(t *testing.T) {
	keys, err := stored.NewKeys(map[string]stored.Disk{"plane": {Certificates: []stored.Certificate{{Name: "pki/ca", Signer: "pki/ca", CommonName: "kubernetes", Authority: true, Lifetime: time.Hour}}}})
	if err != nil {
		t.Fatal(err)
	}
	from := oldID
	from.Public = keys.Public()
	ca := from.Public["pki/ca"]
	pod := &corev1.Pod{ObjectMeta: object("agent-x", uidB, time.Second), Spec: corev1.PodSpec{NodeName: "worker", Containers: []corev1.Container{{
		Name: "agent", Env: []corev1.EnvVar{{Name: "API", Value: "10.201.1.2:6443"}},
	}}}}
	pod.OwnerReferences = []metav1.OwnerReference{{Kind: "DaemonSet", Name: "agent", UID: uidA}}
	pod.Annotations = map[string]string{answers: "true"}
	pod.Status = corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "10.201.1.3", QOSClass: corev1.PodQOSBurstable,
		Conditions:        []corev1.PodCondition{{Type: corev1.PodReady}, {Type: corev1.PodScheduled, LastTransitionTime: metav1.NewTime(began)}},
		ContainerStatuses: []corev1.ContainerStatus{{Name: "agent", ContainerID: "containerd://1"}}}
	mirror := &corev1.Pod{ObjectMeta: object("etcd-plane", "44444444-4444-4444-8444-444444444444", 0)}
	mirror.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "x"}
	dns := &corev1.Pod{ObjectMeta: object("coredns-x", "55555555-5555-4555-8555-555555555555", 0)}
	dns.Labels = map[string]string{"k8s-app": "kube-dns"}
	config := &corev1.ConfigMap{ObjectMeta: object("cluster-info", "66666666-6666-4666-8666-666666666666", 2*time.Second), Data: map[string]string{
		"jws-kubeconfig-abcdef": "eyJhbGciOiJIUzI1NiJ9..x", "ca.crt": ca,
		"kubeconfig": "certificate-authority-data: " + base64.StdEncoding.EncodeToString([]byte(ca)) + "\nserver: https://10.201.1.2:6443\nv6: https://[fd00:201:0:1::2]:6443\n",
	}}
	set := &appsv1.DaemonSet{ObjectMeta: object("agent", uidA, time.Second), Status: appsv1.DaemonSetStatus{NumberReady: 3}}
	slice := &discoveryv1.EndpointSlice{ObjectMeta: object("kube-dns-x", "77777777-7777-4777-8777-777777777777", 0), Endpoints: []discoveryv1.Endpoint{{Addresses: []string{"10.244.1.2"}}}}
	node := &corev1.Node{ObjectMeta: object("worker", nodeUID, 3*time.Second), Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady}}}}
	state := stateOf(t, map[string]runtime.Object{
		"pods/kube-system/agent-x": pod, "pods/kube-system/etcd-plane": mirror, "pods/kube-system/coredns-x": dns,
		"configmaps/kube-public/cluster-info": config, "daemonsets/kube-system/agent": set, "endpointslices/kube-system/kube-dns-x": slice, "minions/worker": node,
		"secrets/kube-system/key": &corev1.Secret{ObjectMeta: object("key", "", 0)}, "events/a": &corev1.Event{}, "leases/a/b": &corev1.Event{},
	})
	api := fmt.Sprintf(`{"kind":"APIService","metadata":{"name":"v1.","uid":"%s","creationTimestamp":"%s"},"spec":{"n":12345678901234567}}`, "88888888-8888-4888-8888-888888888888", began.Format(time.RFC3339))
	state.KVs = append(state.KVs, stored.KV{Key: []byte(stored.Registry + "apiregistration.k8s.io/apiservices/v1."), Value: []byte(api)})

	general, made, err := Generalize(state, from)
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"pods/kube-system/etcd-plane", "pods/kube-system/coredns-x", "secrets/kube-system/key", "events/a", "leases/a/b", "minions/worker"} {
		if has(general, path) {
			t.Errorf("the template has %s", path)
		}
	}
	to := newID
	others, err := stored.NewKeys(map[string]stored.Disk{"plane": {Certificates: []stored.Certificate{{Name: "pki/ca", Signer: "pki/ca", CommonName: "kubernetes", Authority: true, Lifetime: time.Hour}}}})
	if err != nil {
		t.Fatal(err)
	}
	to.Public = others.Public()
	now := began.Add(24 * time.Hour)
	want := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "worker", Labels: map[string]string{"a": "b"}}, Spec: corev1.NodeSpec{PodCIDR: "10.244.1.0/24"}}
	out, err := Personalize(general, oldID, to, made, []*corev1.Node{want}, now)
	if err != nil {
		t.Fatal(err)
	}

	gotPod, gotSet := get[*corev1.Pod](t, out, "pods/kube-system/agent-x"), get[*appsv1.DaemonSet](t, out, "daemonsets/kube-system/agent")
	if gotPod.Status.Phase != corev1.PodPending || gotPod.Status.PodIP != "" || len(gotPod.Status.ContainerStatuses) != 0 || len(gotPod.Status.Conditions) != 1 {
		t.Errorf("the pod has run: %+v", gotPod.Status)
	}
	if gotPod.Spec.NodeName != "worker" || gotPod.Annotations[answers] != "" || gotPod.Spec.Containers[0].Env[0].Value != "10.99.1.2:6443" {
		t.Errorf("the pod: %+v", gotPod)
	}
	if gotPod.UID == uidB || gotSet.UID == uidA || gotPod.OwnerReferences[0].UID != gotSet.UID {
		t.Errorf("UIDs: pod %s of %s, DaemonSet %s", gotPod.UID, gotPod.OwnerReferences[0].UID, gotSet.UID)
	}
	if fields := gotPod.ManagedFields[0].FieldsV1.GetRawString(); len(gotPod.ManagedFields) != 1 || !strings.Contains(fields, string(gotSet.UID)) {
		t.Errorf("managed fields: %+v", gotPod.ManagedFields)
	}
	if gotSet.Status.NumberReady != 0 || len(get[*discoveryv1.EndpointSlice](t, out, "endpointslices/kube-system/kube-dns-x").Endpoints) != 0 {
		t.Error("something is ready before it was begun")
	}
	// The youngest object is of now, and the others are as much older as they were.
	if got := gotPod.CreationTimestamp.Time; !got.Equal(now.Add(-time.Second)) {
		t.Errorf("the pod is of %v", got)
	}
	gotConfig := get[*corev1.ConfigMap](t, out, "configmaps/kube-public/cluster-info").Data
	if gotConfig["ca.crt"] != to.Public["pki/ca"] {
		t.Error("the authority is another one's")
	}
	kubeconfig := "certificate-authority-data: " + base64.StdEncoding.EncodeToString([]byte(to.Public["pki/ca"])) + "\nserver: https://10.99.1.2:6443\nv6: https://[fd00:99:0:1::2]:6443\n"
	if gotConfig["kubeconfig"] != kubeconfig || len(gotConfig) != 2 {
		t.Errorf("cluster-info: %q", gotConfig)
	}
	gotNode := get[*corev1.Node](t, out, "minions/worker")
	if gotNode.UID == "" || gotNode.UID == nodeUID || gotNode.Labels["a"] != "b" || len(gotNode.Status.Conditions) != 0 || !gotNode.CreationTimestamp.Time.Equal(now.Add(-3*time.Second)) {
		t.Errorf("the node: %+v", gotNode)
	}
	for _, kv := range out.KVs {
		if bytes.HasSuffix(kv.Key, []byte("/v1.")) && (!bytes.Contains(kv.Value, []byte(now.Format(time.RFC3339))) || !bytes.Contains(kv.Value, []byte(`"n":12345678901234567`))) {
			t.Errorf("the APIService: %s", kv.Value)
		}
		for _, theirs := range []string{"10.201.", "fd00:201", string(uidA), string(uidB), string(nodeUID), "{{fathom"} {
			if bytes.Contains(kv.Value, []byte(theirs)) {
				t.Errorf("%s has %s", kv.Key, theirs)
			}
		}
	}
}

// No template is made of a cluster with objects of which nobody here can tell what is in them.
func TestRefused(t *testing.T) {
	secretMap := &corev1.ConfigMap{ObjectMeta: object("a", uidA, 0), Data: map[string]string{"key": "-----BEGIN EC PRIVATE KEY-----\nx\n"}}
	var strange stored.State
	if err := strange.Add("configmaps/a/b", secretMap); err != nil {
		t.Fatal(err)
	}
	for name, state := range map[string]stored.State{
		"a key":                strange,
		"a custom resource":    {KVs: []stored.KV{{Key: []byte("/registry/example.com/things/a/b"), Value: []byte(`{"metadata":{"name":"b"}}`)}}},
		"an unknown kind":      {KVs: []stored.KV{{Key: []byte("/registry/things/a"), Value: []byte("k8s\x00\x0a\x0a\x0a\x02v1\x12\x04What")}}},
		"what is encrypted":    {KVs: []stored.KV{{Key: []byte("/registry/configmaps/a/b"), Value: []byte("k8s:enc:aescbc:v1:key1:xxxx")}}},
		"another prefix":       {KVs: []stored.KV{{Key: []byte("/other/configmaps/a/b"), Value: []byte(`{}`)}}},
		"an APIService's text": {KVs: []stored.KV{{Key: []byte("/registry/apiregistration.k8s.io/apiservices/a"), Value: []byte(`{`)}}},
	} {
		if _, _, err := Generalize(state, oldID); err == nil {
			t.Errorf("%s is no error", name)
		}
	}
}

// A file that was cut or changed is no template.
func TestFile(t *testing.T) {
	d := stored.Disk{Texts: map[string]string{"manifests/etcd.yaml": "kind: Pod\n"}, Certificates: []stored.Certificate{{Name: "pki/ca", Signer: "pki/ca", Authority: true}}}
	want := &Template{Underlay4: oldID.Underlay4, Underlay6: oldID.Underlay6, Planes: map[string]stored.Disk{"plane": d},
		Objects: stored.State{KVs: []stored.KV{{Key: []byte("/registry/a"), Value: bytes.Repeat([]byte("value "), 1000)}}}, Nodes: map[string]metav1.ObjectMeta{}}
	data, err := want.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := Decode(data); err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("%v\n%+v\n%+v", err, got, want)
	}
	for n := range data {
		if _, err := Decode(data[:n]); err == nil {
			t.Errorf("%d bytes of %d are a template", n, len(data))
		}
		changed := bytes.Clone(data)
		changed[n] ^= 1
		if got, err := Decode(changed); err == nil && !reflect.DeepEqual(got, want) {
			t.Errorf("with byte %d changed it is another template", n)
		}
	}
}

func FuzzDecode(f *testing.F) {
	data, err := (&Template{Objects: stored.State{KVs: []stored.KV{{Key: []byte("/registry/a"), Value: []byte("b")}}}}).Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if template, err := Decode(data); err == nil {
			_, _ = template.Cluster(newID.Underlay4, newID.Underlay6, nil, began)
		}
	})
}

func TestKey(t *testing.T) {
	type cluster struct{ Name string }
	key := func(programs string, c cluster) string {
		k, err := Key(programs, c)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	a := key("v1", cluster{"east"})
	if a != key("v1", cluster{"east"}) || a == key("v2", cluster{"east"}) || a == key("v1", cluster{"west"}) {
		t.Error("keys do not tell clusters apart")
	}
}
