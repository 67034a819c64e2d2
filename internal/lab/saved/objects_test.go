package saved

import (
	"bytes"
	"crypto/tls"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/fathom-network/fathom/internal/lab/stored"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

func object(name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Name: name, Namespace: "default", UID: "11111111-1111-4111-8111-111111111111", CreationTimestamp: metav1.NewTime(time.Unix(1e9, 0))}
}

func stateOf(t *testing.T, objects map[string]runtime.Object) stored.State {
	t.Helper()
	var s stored.State
	for _, path := range slices.Sorted(maps.Keys(objects)) {
		if err := s.Add(path, objects[path]); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// get returns the object at a path; nil if there is none.
func get[T runtime.Object](t *testing.T, s stored.State, path string) (none T) {
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
	return none
}

func secret(kind corev1.SecretType, data map[string]string) *corev1.Secret {
	s := &corev1.Secret{ObjectMeta: object("s"), Type: kind, Data: map[string][]byte{}}
	s.Annotations = map[string]string{corev1.LastAppliedConfigAnnotation: "hunter2", "mine": "yes"}
	for k, v := range data {
		s.Data[k] = []byte(v)
	}
	return s
}

// Nothing of a Secret's values is in a file without secrets, and what reads it finds the form that it expects.
func TestSecretsRemade(t *testing.T) {
	pair, err := stored.PairLike(selfSigned(t))
	if err != nil {
		t.Fatal(err)
	}
	in := stateOf(t, map[string]runtime.Object{
		"secrets/default/opaque": secret(corev1.SecretTypeOpaque, map[string]string{"password": "hunter2", "empty": ""}),
		"secrets/default/tls":    secret(corev1.SecretTypeTLS, map[string]string{"tls.crt": string(pair.Certificate), "tls.key": string(pair.Key)}),
		"secrets/default/odd":    secret(corev1.SecretTypeTLS, map[string]string{"tls.crt": "hunter2", "tls.key": "hunter2"}),
		"secrets/default/docker": secret(corev1.SecretTypeDockerConfigJson, map[string]string{".dockerconfigjson": `{"auths":{"a":{"password":"hunter2"}}}`}),
		"secrets/default/token":  secret(corev1.SecretTypeServiceAccountToken, map[string]string{"token": "hunter2"}),
		"secrets/default/helm":   secret("helm.sh/release.v1", map[string]string{"release": "hunter2"}),
		"secrets/default/boot":   secret(corev1.SecretTypeBootstrapToken, map[string]string{"token-secret": "hunter2"}),
		"configmaps/default/a":   &corev1.ConfigMap{ObjectMeta: object("a"), Data: map[string]string{"cert": string(pair.Certificate)}},
	})
	in.KVs = append(in.KVs, stored.KV{Key: []byte(compactRevision), Value: []byte("7")})
	all, err := Keep(in, true)
	if err != nil || len(all.KVs) != len(in.KVs)-1 {
		t.Fatalf("with secrets there are %d of %d keys: %v", len(all.KVs), len(in.KVs), err)
	}
	out, err := Keep(in, false)
	if err != nil {
		t.Fatal(err)
	}
	for _, kv := range out.KVs {
		if bytes.Contains(kv.Value, []byte("hunter2")) || bytes.Contains(kv.Value, pair.Key) {
			t.Errorf("%s has the secret", kv.Key)
		}
	}
	opaque := get[*corev1.Secret](t, out, "secrets/default/opaque")
	if len(opaque.Data["password"]) != 7 || len(opaque.Data["empty"]) != 0 || opaque.Annotations["mine"] != "yes" || opaque.UID != "11111111-1111-4111-8111-111111111111" {
		t.Errorf("the Secret became %+v", opaque)
	}
	made := get[*corev1.Secret](t, out, "secrets/default/tls")
	cert, err := tls.X509KeyPair(made.Data["tls.crt"], made.Data["tls.key"])
	if err != nil {
		t.Fatalf("the certificate and the key: %v", err)
	}
	if cert.Leaf.Subject.CommonName != "example" || !slices.Equal(cert.Leaf.DNSNames, []string{"a.example"}) {
		t.Errorf("the certificate is for %v, %v", cert.Leaf.Subject, cert.Leaf.DNSNames)
	}
	if got := get[*corev1.Secret](t, out, "secrets/default/docker").Data[".dockerconfigjson"]; string(got) != `{"auths":{}}` {
		t.Errorf("the registry's password became %s", got)
	}
	for _, gone := range []string{"helm", "boot"} {
		if s := get[*corev1.Secret](t, out, "secrets/default/"+gone); s != nil {
			t.Errorf("%s is there", gone)
		}
	}
}

func selfSigned(t *testing.T) []byte {
	t.Helper()
	planes := map[string]stored.Disk{"a": {Certificates: []stored.Certificate{
		{Name: "ca", Signer: "ca", CommonName: "example", DNSNames: []string{"a.example"}, Authority: true, Lifetime: time.Hour}}}}
	keys, err := stored.NewKeys(planes)
	if err != nil {
		t.Fatal(err)
	}
	return []byte(keys.Public()["ca"])
}

// What cannot be told of is an error, and names the object.
func TestNotKept(t *testing.T) {
	key := &corev1.ConfigMap{ObjectMeta: object("a"), Data: map[string]string{"k": "-----BEGIN RSA PRIVATE KEY-----\nx\n"}}
	inKubeconfig := &corev1.ConfigMap{ObjectMeta: object("a"), Data: map[string]string{"k": "client-key-data: LS0tLS1CRUdJTiBFQyBQUklWQVRFIEtFWS0tLS0tCng="}}
	token := &corev1.ConfigMap{ObjectMeta: object("a"), Data: map[string]string{"k": "token: eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJrdWJlIn0.c2lnbmF0dXJl"}}
	for name, c := range map[string]struct {
		state   stored.State
		secrets bool // whether it can be saved with secrets
	}{
		"a key":           {stateOf(t, map[string]runtime.Object{"configmaps/default/a": key}), true},
		"a kubeconfig":    {stateOf(t, map[string]runtime.Object{"configmaps/default/a": inKubeconfig}), true},
		"a token":         {stateOf(t, map[string]runtime.Object{"configmaps/default/a": token}), true},
		"encrypted":       {stored.State{KVs: []stored.KV{{Key: []byte("/registry/configmaps/default/a"), Value: []byte("k8s:enc:aescbc:v1:x")}}}, false},
		"a key as a JSON": {stored.State{KVs: []stored.KV{{Key: []byte("/registry/example.com/things/default/a"), Value: []byte(`{"a":"-----BEGIN PRIVATE KEY-----"}`)}}}, true},
	} {
		_, err := Keep(c.state, false)
		if !IsNotSaved(err) || !strings.Contains(err.Error(), "default/a") {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := Keep(c.state, true); (err == nil) != c.secrets {
			t.Errorf("%s with secrets: %v", name, err)
		}
	}
}

var (
	then = stored.Identity{Underlay4: netip.MustParsePrefix("10.201.0.0/16"), Underlay6: netip.MustParsePrefix("fd00:201::/48"), Public: map[string]string{"ca": "OLD CA"}}
	now  = stored.Identity{Underlay4: netip.MustParsePrefix("10.99.0.0/16"), Underlay6: netip.MustParsePrefix("fd00:99::/48"), Public: map[string]string{"ca": "NEW CA"}}
)

// objects is a cluster with something of each kind that is treated in its own way.
func objects(t *testing.T) *Cluster {
	running := &corev1.Pod{ObjectMeta: object("running"), Spec: corev1.PodSpec{NodeName: "east-worker1"}, Status: corev1.PodStatus{
		Phase: corev1.PodRunning, PodIP: "10.244.1.2", HostIP: "10.201.1.2", ContainerStatuses: []corev1.ContainerStatus{{Name: "a", Ready: true}},
		Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}, {Type: corev1.PodScheduled, Status: corev1.ConditionTrue}},
	}}
	ended := &corev1.Pod{ObjectMeta: object("ended"), Status: corev1.PodStatus{Phase: corev1.PodSucceeded, ContainerStatuses: []corev1.ContainerStatus{{Name: "a"}}}}
	mirror := &corev1.Pod{ObjectMeta: object("mirror")}
	mirror.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "x"}
	node := &corev1.Node{ObjectMeta: object("east-worker1"), Status: corev1.NodeStatus{
		Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}, Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "10.201.1.2"}}}}
	s := stateOf(t, map[string]runtime.Object{
		"pods/default/running":    running,
		"pods/default/ended":      ended,
		"pods/kube-system/mirror": mirror,
		"minions/east-worker1":    node,
		"configmaps/default/mine": &corev1.ConfigMap{ObjectMeta: object("mine"), Data: map[string]string{"a": "b"}},
		"configmaps/default/ca":   &corev1.ConfigMap{ObjectMeta: object("ca"), Data: map[string]string{"ca": "OLD CA\n", "at": "https://10.201.1.2:6443"}},
		"secrets/default/token":   secret(corev1.SecretTypeServiceAccountToken, map[string]string{"token": "x"}),
		"secrets/default/boot":    secret(corev1.SecretTypeBootstrapToken, nil),
	})
	for path, value := range map[string]string{
		"leases/kube-system/kube-scheduler": "x", "leases/default/mine": `{"kind":"Lease"}`, "masterleases/10.201.1.2": "x",
		"example.com/things/default/a": `{"z":1,"at":"10.201.1.3","when":"2026-01-02T03:04:05+01:00"}`, "example.com/things/default/b": `{"z":1, "a":2}`,
	} {
		s.KVs = append(s.KVs, stored.KV{Key: []byte(stored.Registry + path), Value: []byte(value)})
	}
	return &Cluster{State: s}
}

func values(s stored.State) map[string]string {
	all := map[string]string{}
	for _, kv := range s.KVs {
		all[strings.TrimPrefix(string(kv.Key), stored.Registry)] = string(kv.Value)
	}
	return all
}

// A lab that goes on where it was has the same objects byte for byte, but for what its programs say of pods and nodes.
func TestBeginSame(t *testing.T) {
	c := objects(t)
	before := values(c.State)
	state, err := c.Begin(then, then, true)
	if err != nil {
		t.Fatal(err)
	}
	after := values(state)
	for _, gone := range []string{"leases/kube-system/kube-scheduler", "masterleases/10.201.1.2", "pods/kube-system/mirror"} {
		if _, there := after[gone]; there {
			t.Errorf("%s is there", gone)
		}
		delete(before, gone)
	}
	for _, changed := range []string{"pods/default/running", "minions/east-worker1"} {
		if after[changed] == before[changed] {
			t.Errorf("%s is as it was", changed)
		}
		delete(before, changed)
		delete(after, changed)
	}
	if !maps.Equal(before, after) {
		t.Errorf("the objects are\n%q\nwant\n%q", after, before)
	}
	pod := get[*corev1.Pod](t, state, "pods/default/running")
	if pod.Status.Phase != corev1.PodPending || pod.Status.PodIP != "" || len(pod.Status.ContainerStatuses) > 0 || len(pod.Status.Conditions) != 1 ||
		pod.Spec.NodeName != "east-worker1" || pod.UID != "11111111-1111-4111-8111-111111111111" {
		t.Errorf("the pod begins as %+v", pod)
	}
	if node := get[*corev1.Node](t, state, "minions/east-worker1"); node.Status.Conditions[0].Status != corev1.ConditionUnknown {
		t.Errorf("the node begins as %+v", node.Status)
	}
}

// A lab with other addresses and keys has them wherever they stand, and what has none of them is the same byte for byte.
func TestBeginElsewhere(t *testing.T) {
	c := objects(t)
	before := values(c.State)
	state, err := c.Begin(then, now, false)
	if err != nil {
		t.Fatal(err)
	}
	after := values(state)
	for key, value := range after {
		if strings.Contains(value, "10.201.") || strings.Contains(value, "OLD CA") {
			t.Errorf("%s has what was the other lab's: %q", key, value)
		}
	}
	for _, same := range []string{"configmaps/default/mine", "pods/default/ended", "example.com/things/default/b", "leases/default/mine"} {
		if after[same] != before[same] {
			t.Errorf("%s became %q, and was %q", same, after[same], before[same])
		}
	}
	if got := get[*corev1.ConfigMap](t, state, "configmaps/default/ca").Data; got["ca"] != "NEW CA\n" || got["at"] != "https://10.99.1.2:6443" {
		t.Errorf("the ConfigMap has %v", got)
	}
	if got, want := after["example.com/things/default/a"], `{"at":"10.99.1.3","when":"2026-01-02T03:04:05+01:00","z":1}`; got != want {
		t.Errorf("the resource is %s, want %s", got, want)
	}
	if s := get[*corev1.Secret](t, state, "secrets/default/token"); len(s.Data) > 0 {
		t.Error("a token that was signed with another key is there")
	}
	if s := get[*corev1.Secret](t, state, "secrets/default/boot"); s != nil {
		t.Error("a bootstrap token of the other lab is there")
	}
}
