package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// passing are the kinds of objects that tell of what goes on, and not of what a cluster is.
var passing = []string{"events", "events.events.k8s.io", "leases.coordination.k8s.io", "componentstatuses", "endpoints", "endpointslices.discovery.k8s.io",
	"csinodes.storage.k8s.io", "ipblocks.fathom.network", "secrets"}

// cmdObjects writes a cluster's objects into a file, one a line, without what differs between two clusters of one description: UIDs,
// times, keys and certificates, random names, addresses that pods happened to get.
func cmdObjects(ts *testscript.TestScript, neg bool, args []string) {
	exact := len(args) > 0 && args[0] == "-exact"
	if exact {
		args = args[1:]
	}
	if neg || len(args) != 2 {
		ts.Fatalf("usage: objects [-exact] CLUSTER FILE")
	}
	kubectl := func(more ...string) []byte {
		argv := resolve(ts, append([]string{"kubectl", args[0]}, more...))
		ts.Check(ts.Exec(argv[0], argv[1:]...))
		return []byte(ts.ReadFile("stdout"))
	}
	kinds := slices.DeleteFunc(strings.Fields(string(kubectl("api-resources", "--verbs=list", "-o", "name"))), func(kind string) bool {
		return slices.Contains(passing, kind) && (!exact || kind != "secrets")
	})
	type objects struct {
		Items []map[string]any `json:"items"`
	}
	var list objects
	for deadline := time.Now().Add(time.Minute * slow()); ; time.Sleep(time.Second) {
		list = objects{} // or maps of the last time would be added to
		ts.Check(json.Unmarshal(kubectl("get", strings.Join(kinds, ","), "-A", "-o", "json"), &list))
		if !slices.ContainsFunc(list.Items, notReady) {
			break
		}
		if time.Now().After(deadline) {
			ts.Fatalf("not all pods are Ready")
		}
	}
	var lines []string
	for _, object := range list.Items {
		if exact {
			if line, ok := exactly(ts, object); ok {
				lines = append(lines, line)
			}
			continue
		}
		kept := anonymous("", object).(map[string]any)
		metadata := kept["metadata"].(map[string]any)
		if kept["kind"] == "Pod" {
			// Who was asked whether it answers, and on which of its nodes, is decided by moments.
			delete(metadata, "managedFields")
			if annotations, ok := metadata["annotations"].(map[string]any); ok {
				if delete(annotations, "fathom.network/answers"); len(annotations) == 0 {
					delete(metadata, "annotations")
				}
			}
			delete(kept["spec"].(map[string]any), "nodeName")
		}
		name := metadata["name"].(string)
		data, err := json.Marshal(kept)
		ts.Check(err)
		line := fmt.Sprintf("%s %v/%s %s", kept["kind"], metadata["namespace"], name, data)
		lines = append(lines, strings.ReplaceAll(line, name, randomName.ReplaceAllString(name, "$1-RANDOM")))
	}
	slices.Sort(lines)
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), []byte(strings.Join(lines, "\n")+"\n"), 0o600))
}

// exactly writes an object with all that a lab has again that begins where it was saved; nothing for a static pod's mirror.
func exactly(ts *testscript.TestScript, object map[string]any) (string, bool) {
	metadata := object["metadata"].(map[string]any)
	delete(metadata, "resourceVersion")
	delete(metadata, "managedFields") // who wrote a status last is in it
	annotations, _ := metadata["annotations"].(map[string]any)
	if annotations["kubernetes.io/config.mirror"] != nil {
		return "", false
	}
	if delete(annotations, "fathom.network/answers"); len(annotations) == 0 {
		delete(metadata, "annotations")
	}
	delete(object, "status")
	if data, ok := object["data"].(map[string]any); ok {
		for key := range data {
			if strings.HasPrefix(key, "jws-kubeconfig-") { // signed by whichever controller manager
				delete(data, key)
			}
		}
	}
	data, err := json.Marshal(object)
	ts.Check(err)
	return fmt.Sprintf("%s %v/%v %s", object["kind"], metadata["namespace"], metadata["name"], data), true
}

// notReady says whether the object is a pod that is not Ready, and has not ended well either.
func notReady(object map[string]any) bool {
	if object["kind"] != "Pod" {
		return false
	}
	status, _ := object["status"].(map[string]any)
	if status["phase"] == "Succeeded" {
		return false
	}
	conditions, _ := status["conditions"].([]any)
	return !slices.ContainsFunc(conditions, func(c any) bool {
		condition, _ := c.(map[string]any)
		return condition["type"] == "Ready" && condition["status"] == "True"
	})
}

var (
	randomName  = regexp.MustCompile(`^(.*)-[bcdfghjklmnpqrstvwxz2456789]{5}$`)
	randomWords = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}` + // UIDs
		`|kube-api-access-[a-z0-9]{5}` +
		`|\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z` +
		`|-----BEGIN CERTIFICATE-----[^-]*-----END CERTIFICATE-----` +
		`|LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS[A-Za-z0-9+/=]*` +
		`|[0-9a-f]{32,64}`) // identifiers of containers and machines, and hashes of manifests
)

// unlike are fields that two clusters have for themselves.
var unlike = []string{"resourceVersion", "podIP", "podIPs", "hostIP", "hostIPs", "restartCount", "started", "startedAt", "lastState", "time", "message",
	"images", "allocatable", "capacity", "bootID", "kernelVersion", "observedGeneration", "fieldsV1"}

// anonymous returns a value of an object without what only the one cluster has.
func anonymous(key string, v any) any {
	switch v := v.(type) {
	case string:
		return randomWords.ReplaceAllString(v, "OWN")
	case []any:
		for i := range v {
			v[i] = anonymous("", v[i])
		}
		switch key {
		case "conditions", "managedFields": // in the order in which they were written
			slices.SortFunc(v, func(a, b any) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
		}
	case map[string]any:
		for k := range v {
			if slices.Contains(unlike, k) || strings.HasPrefix(k, "jws-kubeconfig-") {
				delete(v, k)
				continue
			}
			v[k] = anonymous(k, v[k])
		}
	}
	return v
}
