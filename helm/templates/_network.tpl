{{/* Pods of this release, by component, as peers of a NetworkPolicy. Takes a dict with root and components. */}}
{{- define "impala.peers" -}}
{{- range .components }}
- podSelector:
    matchLabels:
      {{- include "impala.selectorLabels" (dict "root" $.root "component" .) | nindent 6 }}
{{- end }}
{{- end }}

{{/* All that pods may reach where egress is restricted. Policies see the port of the pod that answers, and
OpenShift's DNS listens on 5353. */}}
{{- define "impala.egress" -}}
egress:
  - to:
      - podSelector:
          matchLabels:
            app.kubernetes.io/name: impala
            app.kubernetes.io/instance: {{ .Release.Name | quote }}
  - ports:
      - {protocol: UDP, port: 53}
      - {protocol: TCP, port: 53}
      - {protocol: UDP, port: 5353}
      - {protocol: TCP, port: 5353}
{{- end }}

{{/* What the policies of all roles have in common: whom they are for, and who reads metrics.
Takes a dict with root and component; the template goes on with further rules of `ingress`. */}}
{{- define "impala.networkPolicySpec" -}}
{{- $policy := .root.Values.networkPolicy -}}
podSelector:
  matchLabels:
    {{- include "impala.selectorLabels" . | nindent 4 }}
policyTypes: [Ingress{{ if $policy.restrictEgress }}, Egress{{ end }}]
{{- if $policy.restrictEgress }}
{{ include "impala.egress" .root }}
{{- end }}
ingress:
  - ports:
      - {protocol: TCP, port: 9400}
    {{- with $policy.metricsFrom }}
    from:
      {{- include "impala.peers" (dict "root" $.root "components" (list "test")) | nindent 6 }}
      {{- toYaml . | nindent 6 }}
    {{- end }}
{{- end }}
